"""SGDSaI, the optimizer: its state, its step, saving and loading."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sai.batches import State
from hf_sai.calibration import Calibration, Work
from hf_sai.checks import check_state_dict
from hf_sai.collection import Collector, Prepared, block_states, check_group_params, largest_gsnr, update
from hf_sai.options import check_group
from hf_sai.state import restore
from hf_sai.zero import Partitions

try:  # like torch.optim: `torch.compiler.disable` would import the compiler together with this package
    from torch._compile import _disable_dynamo as outside_compiled_code
except ImportError:  # a private name
    from torch.compiler import disable as outside_compiled_code  # type: ignore[no-redef]


class SGDSaI(Optimizer):
    """SGD with momentum that scales each row and column of a weight by its first gradients, in AdamW's units.

    The channels of a matrix are its rows and columns (see :mod:`hf_sai.channels`). For an element p with gradient g

        s = 1 / (rms + eps)
        u = clamp(s * g, -2, 2)
        m = m + w * (u - m),        w = (1 - momentum) / (1 - momentum^t)
        p = (1 - lr * weight_decay) * p - lr * m

    Here rms is the root mean square of the row's gradient times that of the column's gradient relative to all columns.
    Both are averaged over the first 60 usable gradients. A gradient is usable if it is finite and not all zero. After
    that, rms follows slowly: one gradient in ten is measured. In groups with ``token_rows=True``, zeros count and the
    bound is 30. :func:`hf_sai.param_groups` makes these groups.

    ``scaling="raw"`` and ``"max"`` are the paper's method (arXiv 2412.11768, Algorithm 1) in the paper's units. Each
    parameter has one scale, gsnr = ||g|| / (std(g) + eps) of its first usable gradient. ``"max"`` divides it by the
    largest gsnr. There is no clamp, and m starts as the first gradient. ``eps`` is added to the standard deviation
    instead of under the root, as in the authors' release. docs/method.md has the reasons and the measurements.

    Args:
        params: parameters, named parameters or param groups of real floating-point tensors of any shape.
        lr: learning rate, a number or 0-dim tensor >= 0, in AdamW's units or the paper's (see ``scaling``).
        momentum: in [0, 1). With 0, no buffer is kept.
        eps: at least 0, in units of the gradient.
        weight_decay: at least 0, decoupled, in units of 1 / lr like AdamW's.
        scaling: ``"adamw"``, ``"raw"`` or ``"max"``.
        maximize: maximize instead of minimize.
        foreach: update many blocks in each launch. This is the default on CUDA if the fused path is unavailable.
        fused: update all blocks in one Triton launch. This is the default on CUDA if Triton is installed.
        momentum_dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``. The default is each parameter's own dtype. int8 has
            one float32 scale for every 128 elements and is rounded stochastically (see :mod:`hf_sai.momentum`).
        stochastic_rounding: round all bfloat16 values stochastically, without bias.

    :mod:`hf_sai.state` describes the state of a parameter. Its size is half that of AdamW's. ``step`` never modifies
    gradients. For CUDA graph capture, ``lr`` must be a tensor on the device if it changes later, and every block must
    be calibrated before. A captured step does not change the scales.

    Raises:
        ValueError: for a hyper-parameter out of range, a complex parameter, a parameter that FSDP1 flattened, a sparse
            gradient, ``fused=True`` where it is impossible, or a state dict that does not fit. Nothing has changed
            then.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.parameters(), lr=1e-3)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["column_scale"].shape  # a scale for each of the 4 inputs
        torch.Size([1, 4])
    """

    _partitions: Partitions

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scaling: str = "adamw",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "scaling": scaling,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "token_rows": False,  # per group: whether each row of its matrices is a token
            "step": 0,  # per group: the number of steps in which a block was calibrated
        }
        check_group(defaults)
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Drop everything that is derived from the state and the groups."""
        self._calibration = Calibration()
        self._collector = Collector(self._partitions)
        self._release: Any = self.__dict__.get("_release")

    def __setstate__(self, state: dict[str, Any]) -> None:
        old = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("token_rows", False)
            group.setdefault("step", 0)
        loaded = self.__dict__.pop("_loading", None)
        if loaded is not None:  # torch has cast every tensor to its parameter's dtype: use the saved tensors instead
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
                for p, key in zip(group["params"], saved["params"], strict=True):
                    if key in loaded["state"]:
                        restore(self.state[p], loaded["state"][key], p, group)
            self._partitions.replace(old, self.param_groups)
        if "_partitions" not in self.__dict__:  # a copy, or from a pickle
            self._partitions = Partitions()
            for group in self.param_groups:
                self._partitions.add(group)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its blocks are calibrated at their own first usable gradients.

        Args:
            param_group: ``params`` and any hyper-parameter that differs from the optimizer's. Set ``token_rows=True``
                if each row of its matrices, ``(tokens, features)``, is a token.

        Raises:
            ValueError: if the constructor would refuse the group. The group is not added then.

        Example:
            >>> optimizer = SGDSaI(torch.nn.Linear(4, 2).parameters(), lr=1e-3)
            >>> embedding = torch.nn.Embedding(10, 4)
            >>> optimizer.add_param_group({"params": embedding.parameters(), "token_rows": True, "weight_decay": 0.0})
            >>> len(optimizer.param_groups)
            2
        """
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_group_params(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if "_partitions" not in self.__dict__:
            self._partitions = Partitions()
        self._partitions.add(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, with zeros for trained blocks that have had no gradient: loaders expect every entry.

        The optimizer itself does not change.

        Returns:
            ``state`` and ``param_groups``. Scales are always float32.

        Example:
            >>> optimizer = SGDSaI(torch.nn.Linear(4, 2).parameters(), lr=1e-3)
            >>> sorted(optimizer.state_dict())
            ['param_groups', 'state']
        """
        packed = super().state_dict()
        if self.state:
            for group, ids in zip(self.param_groups, packed["param_groups"], strict=True):
                for i, (p, key) in enumerate(zip(group["params"], ids["params"], strict=True)):
                    if p.requires_grad and "scale" not in packed["state"].get(key, {}):
                        packed["state"][key] = dict(packed["state"].get(key, {}))
                        self._collector.allocate(packed["state"][key], group, i)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SGDSaI. Float entries keep their dtype, even if the parameters have another one.

        torch's rules apply to entries that SGDSaI does not write, such as those of an optimizer that wraps it.

        Args:
            state_dict: the result of :meth:`state_dict` for parameters of the same shapes in the same groups.

        Raises:
            ValueError: for entries that do not fit the parameters. The optimizer has not changed then.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> saved = SGDSaI(model.parameters(), lr=1e-3).state_dict()
            >>> optimizer = SGDSaI(model.parameters(), lr=1.0)
            >>> optimizer.load_state_dict(saved)
            >>> optimizer.param_groups[0]["lr"]
            0.001
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"a state dict of SGDSaI must be a dict, got {state_dict!r:.80}")

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            for group in self.param_groups:
                for index in range(len(group["params"])):
                    self._partitions.recognise(group, index)
            check_state_dict(self.param_groups, given, self._partitions.shapes())
            self._loading = given

        # Registered last, so that it sees the state dict that the user's own hooks return.
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self.__dict__.pop("_loading", None)

    @torch.no_grad()
    @outside_compiled_code
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure the gradients that are due in this step, then update every block that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss. It is called once.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: for a sparse gradient.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
            >>> optimizer = SGDSaI([weight], lr=0.1, weight_decay=0.0)
            >>> weight.grad = torch.tensor([4.0, -4.0])
            >>> optimizer.step()
            >>> weight.data  # the scaled gradient has a root mean square of one, whatever its size was
            tensor([ 0.9000, -0.9000])
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._release.finish()
        else:
            groups = self.param_groups
            self._run([w for group in groups for w in self._collector.work(group, groups, self.state)])
        for group in self.param_groups:
            if self._collector.has_calibrated(group):
                group["step"] += 1
        self._calibration.count_step()
        self._partitions.forget()
        return loss

    def _run(self, work: Sequence[Work | Prepared]) -> None:
        measured = [w for w in work if isinstance(w, Work)]
        self._calibration.run(measured, partial(largest_gsnr, self.param_groups, self.state))
        update(work)

    def _step_parameter(self, group_index: int, index: int) -> None:
        """Update one parameter, for gradient release."""
        group = self.param_groups[group_index]
        self._run(self._collector.work_of(group, index, self.param_groups, self.state))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. With gradient release, also clear a step whose backward was not finished."""
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.clear()

    @property
    def releases_gradients(self) -> bool:
        """Whether gradients are released inside backward; see :mod:`hf_sai.release`."""
        return self._release is not None

    @property
    def released_norm(self) -> Tensor | None:
        """The global norm of the gradients that the last backward released, or None if it is not tracked."""
        return None if self._release is None else self._release.norm()

    def block_states(self) -> list[tuple[str, Tensor, State]]:
        """Every block as (index in the param groups, parameter of the model, state). A state may be empty."""
        return block_states(self.param_groups, self.state, self._partitions)
