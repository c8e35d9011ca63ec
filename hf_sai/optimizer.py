"""SGDSaI: holds the state, chooses the path, saves and loads. The mathematics is in gsnr.py and kernels.py."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sai.checks import SCALINGS, block_name, check_group, check_parameters, check_state_dict, momentum_dtype
from hf_sai.gsnr import BlockStatistics, is_dtensor, measure, scales, to_local
from hf_sai.kernels import Scalar, update_foreach, update_single_tensor


class _Block(NamedTuple):
    """A parameter with a gradient in this step."""

    param: Tensor
    grad: Tensor | None  # None: only to join the collectives of a sharded block
    state: dict[str, Tensor]
    name: str
    maximize: bool


class SGDSaI(Optimizer):
    r"""SGD with momentum whose learning rate is scaled once per parameter block by the g-SNR of its first gradient.

    Block i is one ``nn.Parameter`` with d elements and gradient g. At the block's first usable gradient (finite and
    not all zero) :math:`\text{gsnr} = \lVert g \rVert_2 / (\operatorname{std}(g) + \text{eps})` and :math:`m = g`;
    in every later step :math:`m \leftarrow \mu m + (1 - \mu) g`; always
    :math:`\theta \leftarrow (1 - \text{lr} \cdot \lambda)\theta - \text{lr} \cdot \text{scale} \cdot m`.

    Differences from Algorithm 1 of the paper (arXiv 2412.11768): ``eps`` is added to the standard deviation, not put
    under the root, as in the authors' own release; ``scaling="raw"`` does not divide by the largest g-SNR (line 14),
    also as in their release; a block is calibrated when it first has a usable gradient instead of at step 1, so that
    LoRA's A (whose first gradient is zero) and late unfrozen blocks train. ``scaling="adamw"`` is ours.

    Args:
        params: parameters, named parameters or param groups of real floating-point tensors of any shape.
        lr: learning rate, a float or a 0-dim tensor. Its units depend on ``scaling``: the paper's (default) or AdamW's.
        momentum: mu in [0, 1). At 0 the update is scaled SGD and no buffer is kept.
        eps: added to the standard deviation, in units of the gradient.
        weight_decay: lambda, decoupled, in units of 1/lr as AdamW's.
        scaling: ``"raw"``: scale = gsnr; ``"max"``: scale = gsnr / (largest gsnr), in (0, 1]; ``"adamw"``:
            scale = gsnr * c, where c gives the first update of the blocks calibrated in the same step the root mean
            square that AdamW's first update has, lr, so that lr and weight_decay are in AdamW's units.
        maximize: maximise instead of minimise.
        foreach: update many blocks in each launch; by default on CUDA.
        fused: one launch for all blocks; needs CUDA and Triton.
        momentum_dtype: dtype of the momentum buffers, by default each parameter's own.
        stochastic_rounding: round bfloat16 parameters stochastically, without bias.

    State of a parameter: ``momentum_buffer`` (absent when momentum is 0), ``gsnr`` and ``scale`` (0-dim float32
    tensors, 0 until the block is calibrated). Nothing else decides the trajectory.

    Raises:
        ValueError: for a hyper-parameter out of range, a complex parameter or one that FSDP1 has flattened, a sparse
            gradient, or a state dict that does not fit. Nothing is changed then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scaling: str = "raw",
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
        }
        check_group(defaults)
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Drop what is derived from the state: the scales on the host, the warnings given, the count for the log."""
        self._host_scales: dict[Tensor, tuple[Tensor, int, float]] = {}
        self._warned: set[str] = set()
        self._steps = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its blocks are calibrated at their own first usable gradient."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_parameters(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state of every trained block, also of one that has had no gradient yet: loaders look for every entry."""
        if self.state:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        self._state_of(p, group)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SGDSaI; ``gsnr`` and ``scale`` stay float32 whatever the parameters' dtype is.

        Raises:
            ValueError: for entries that do not fit the parameters; the optimizer is then as it was.
        """
        final: list[dict[str, Any]] = []
        # Registered last, so that it sees what the user's own hooks made of the state dict.
        hook = self.register_load_state_dict_pre_hook(lambda _, given: final.append(given))
        try:
            check_state_dict(self.param_groups, state_dict)
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch has cast every floating-point tensor to its parameter's dtype: take the saved ones instead.
        for group, saved in zip(self.param_groups, final[0]["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                entry = final[0]["state"].get(key, {})
                for name in entry.keys() & {"gsnr", "scale"}:
                    self.state[p][name] = entry[name].to(p.device, torch.float32, copy=True)
                if "momentum_buffer" in entry:
                    dtype = momentum_dtype(p, group["momentum_dtype"])
                    self.state[p]["momentum_buffer"] = entry["momentum_buffer"].to(p.device, dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Calibrate the blocks that have their first usable gradient, then update every block that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, self._blocks(group)) for group in self.param_groups]
        not_finite = self._calibrate(groups)
        for group, blocks in groups:
            self._update(group, [b for b in blocks if b.grad is not None and b.param not in not_finite])
        return loss

    def _blocks(self, group: dict[str, Any]) -> list[_Block]:
        """The blocks of a group that take part in this step, with their state allocated."""
        blocks = []
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                # A process without a gradient still joins the collectives that calibrate a sharded block.
                if not (p.requires_grad and is_dtensor(p) and not self._host_scale(p)):
                    continue
            elif grad.is_sparse:
                name = block_name(group, i)
                raise ValueError(
                    f"SGDSaI needs dense gradients, {name} has a sparse one; build its layer with sparse=False"
                )
            elif is_dtensor(p) and grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
            if p.numel():
                blocks.append(_Block(p, grad, self._state_of(p, group), block_name(group, i), group["maximize"]))
        return blocks

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            if group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=momentum_dtype(p, group["momentum_dtype"]))
            for key in ("gsnr", "scale"):
                state[key] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state

    def _host_scale(self, p: Tensor) -> float:
        """The scale of a block, 0.0 while it is not calibrated; synchronises only where the state has changed."""
        scale = self.state[p].get("scale") if p in self.state else None
        if scale is None:
            return 0.0
        known = self._host_scales.get(p)
        if known is None or known[0] is not scale or known[1] != scale._version:
            known = self._host_scales[p] = (scale, scale._version, scale.item())
        return known[2]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _calibrate(self, groups: list[tuple[dict[str, Any], list[_Block]]]) -> set[Tensor]:
        """Set the scales of the blocks that wait for one; returns those whose first gradient is not finite."""
        self._steps += 1
        waiting = [(group, b) for group, blocks in groups for b in blocks if not self._host_scale(b.param)]
        if not waiting:
            return set()
        measured = measure([b.param for _, b in waiting], [b.grad for _, b in waiting], [g["eps"] for g, _ in waiting])
        pairs = [(group, b, s) for (group, b), s in zip(waiting, measured, strict=True)]
        for scaling in SCALINGS:
            usable = [(b, s) for g, b, s in pairs if g["scaling"] == scaling and s.kind in ("usable", "constant")]
            if usable:
                self._set_scales(scaling, *zip(*usable, strict=True))
        self._warn(
            "has a constant first gradient, whose g-SNR is taken as sqrt(numel)",
            [b.name for _, b, s in pairs if s.kind == "constant"],
        )
        not_finite = [b for _, b, s in pairs if s.kind == "nonfinite"]
        self._warn(
            "has NaN or infinite elements in its first gradient; it is left as it is until its gradient is finite",
            [b.name for b in not_finite],
        )
        return {b.param for b in not_finite}

    def _set_scales(self, scaling: str, blocks: tuple[_Block, ...], statistics: tuple[BlockStatistics, ...]) -> None:
        calibrated = [
            state["gsnr"].item()
            for group in self.param_groups
            if group["scaling"] == scaling == "max"
            for p in group["params"]
            if (state := self.state.get(p))
        ]
        values = scales(statistics, scaling, max(calibrated, default=0.0))
        for block, found, scale in zip(blocks, statistics, values, strict=True):
            block.state["gsnr"].fill_(found.gsnr)
            block.state["scale"].fill_(scale)
            known = torch.tensor(scale, dtype=torch.float32).item()
            self._host_scales[block.param] = (block.state["scale"], block.state["scale"]._version, known)
            if "momentum_buffer" in block.state and block.grad is not None:
                buffer = block.state["momentum_buffer"].copy_(block.grad)
                if block.maximize:
                    buffer.neg_()
        gsnrs = [s.gsnr for s in statistics]
        message = (
            f"SGDSaI calibrated {len(blocks)} blocks at step {self._steps}: "
            f"g-SNR from {min(gsnrs):.4g} to {max(gsnrs):.4g}"
        )
        if scaling == "adamw":
            message += f"; scaling='adamw' with lr is scaling='raw' with {values[0] / gsnrs[0]:.4g} * lr"
        _logger().info(message)

    def _warn(self, what: str, names: list[str]) -> None:
        """Warn once of each kind of gradient, naming the first block and counting the others."""
        if names and what not in self._warned:
            self._warned.add(what)
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            warnings.warn(f"SGDSaI: {names[0]}{others} {what}", stacklevel=2)

    def _update(self, group: dict[str, Any], blocks: list[_Block]) -> None:
        """Update the local part of every block of a group."""
        if not blocks:
            return
        compiling = torch.compiler.is_compiling()
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(b.param.device.type == "cuda" for b in blocks)
        scaled: list[Scalar] = [b.state["scale"] if compiling else self._host_scale(b.param) for b in blocks]
        update = update_foreach if foreach else update_single_tensor
        update(
            [to_local(b.param) for b in blocks],
            [to_local(b.grad) for b in blocks if b.grad is not None],
            [to_local(b.state["momentum_buffer"]) for b in blocks if "momentum_buffer" in b.state],
            scaled,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


def _logger() -> logging.Logger:
    """transformers' logger where that library is in use, else one of our own."""
    if "transformers" in sys.modules:
        logger: logging.Logger = sys.modules["transformers"].utils.logging.get_logger("transformers.hf_sai")
        return logger
    return logging.getLogger("hf_sai")
