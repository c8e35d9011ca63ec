"""SGDSaI: holds the state, chooses the path, saves and loads.

The mathematics is in gsnr.py and kernels.py; when a block is calibrated, in calibration.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_sai.calibration import Calibration, Taking
from hf_sai.checks import block_name, check_group, check_parameters, check_state_dict
from hf_sai.gsnr import Segment, is_dtensor, to_local
from hf_sai.kernels import Block, Scalar, update_blocks, why_not_fused
from hf_sai.state import allocate, restore, shard_number
from hf_sai.zero import Given

if TYPE_CHECKING:
    from hf_sai.release import GradientRelease


class SGDSaI(Optimizer):
    r"""SGD with momentum whose learning rate is scaled once per parameter block by the g-SNR of its first gradient.

    Block i is one ``nn.Parameter`` with d elements and gradient g. At the block's first usable gradient (finite and
    not all zero) :math:`\text{gsnr} = \lVert g \rVert_2 / (\operatorname{std}(g) + \text{eps})` and :math:`m = g`;
    in every later step :math:`m \leftarrow \mu m + (1 - \mu) g`; always
    :math:`\theta \leftarrow (1 - \text{lr} \cdot \lambda)\theta - \text{lr} \cdot \text{scale} \cdot m`.

    Differences from Algorithm 1 of the paper (arXiv 2412.11768): ``eps`` is added to the standard deviation, not put
    under the root, as in the authors' own release; ``scaling="raw"`` does not divide by the largest g-SNR (line 14),
    also as in their release; a block is calibrated when it first has a usable gradient instead of at step 1, so that
    LoRA's A (whose first gradient is zero) and late unfrozen blocks train. ``scaling="adamw"`` and ``"floor"`` are
    ours.

    Args:
        params: parameters, named parameters or param groups of real floating-point tensors of any shape.
        lr: learning rate, a float or a 0-dim tensor. Its units depend on ``scaling``: the paper's (default) or AdamW's.
        momentum: mu in [0, 1). At 0 the update is scaled SGD and no buffer is kept.
        eps: added to the standard deviation, in units of the gradient.
        weight_decay: lambda, decoupled, in units of 1/lr as AdamW's.
        scaling: ``"raw"``: scale = gsnr; ``"max"``: scale = gsnr / (largest gsnr), in (0, 1]; ``"adamw"``:
            scale = gsnr * c, where c gives the first update of the blocks calibrated in the same step the root mean
            square that AdamW's first update has, lr, so that lr and weight_decay are in AdamW's units. A block whose
            gradient is zero until others have moved (LoRA's A) has a gradient in proportion to how far they moved:
            its scale is multiplied by (how far they moved while it was zero) / (a step at the peak lr), at most 1,
            which matters in a warm-up and where momentum begins at zero.
            ``"floor"``: as ``"adamw"``, but no block's scale is below 1 / (r + 1e-8), where r is the larger of the RMS
            of its first gradient g and sqrt(sum g^4 / (3 sum g^2)), the RMS of the part of g that is not nearly zero.
            So that part begins with updates of at least lr in every block; with one constant for all, attention's
            queries and keys, norms and biases begin with much smaller ones.
        maximize: maximise instead of minimise.
        foreach: update many blocks in each launch; by default on CUDA where the fused path is not to be had.
        fused: one Triton launch for all blocks; by default on CUDA where Triton is installed. On a CPU, False keeps
            blocks without weight decay from torch's own fused SGD kernel.
        momentum_dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``, by default each parameter's own dtype. int8 has one
            float32 scale for every 128 elements and is rounded stochastically (see :mod:`hf_sai.momentum`).
        stochastic_rounding: round whatever is stored in bfloat16 stochastically, without bias.
        momentum_init: ``"gradient"``: m begins as the first usable gradient, as in the paper, which therefore weighs as
            much as the next 1 / (1 - momentum) gradients together; ``"zero"`` (ours): m begins at zero, so that the
            first update is (1 - momentum) times as large and updates grow over that many steps.
        clip_threshold: ours, for ``"adamw"`` and ``"floor"``: after its first gradient, a block's gradient g is scaled
            down, in place, to scale * rms(g) = clip_threshold where it is larger: its update, in units of lr, is what
            AdamW's would be about. 1.0 is a good value, 3.0 for small language models from scratch. By default a
            gradient that has grown since the calibration makes an update that has grown as much. One more pass over
            the gradients, and where they are sharded one collective a step.

    State of a parameter: ``momentum_buffer`` (absent when momentum is 0), ``gsnr`` and ``scale`` (0-dim float32
    tensors, not above 0 until the block is calibrated); with int8 momentum ``momentum_scale`` (one dimension,
    float32); where something is rounded stochastically ``rounding_step`` (0-dim int64), the number of updates so
    far, from which with the block's place in the optimizer the random bits are hashed: training resumed is training
    not interrupted.

    ``grad_scale`` and ``found_inf``, set as attributes by ``torch.amp.GradScaler``, are honoured inside the update:
    gradients are divided by the first, and where the second is not 0 nothing changes, calibration included. Set
    ``grad_scale = (norm / max_norm).clamp(min=1)`` to clip without a pass over the gradients.

    Under CUDA graph capture ``lr`` must be a tensor on the device if it is to change, and every block must be
    calibrated: run a few steps before.

    Raises:
        ValueError: for a hyper-parameter out of range, a complex parameter or one that FSDP1 has flattened, a sparse
            gradient, ``fused=True`` where that cannot be, or a state dict that does not fit. Nothing is changed then.
    """

    # GradScaler then calls step also after an overflow, with grad_scale and found_inf set.
    _step_supports_amp_scaling: ClassVar[bool] = True
    _release: "GradientRelease | None" = None

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
        momentum_init: str = "gradient",
        clip_threshold: float | None = None,
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
            "momentum_init": momentum_init,
            "clip_threshold": clip_threshold,
        }
        check_group(defaults)
        self._given = Given()
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Drop what is derived from the state: the scales on the host, the warnings given, the count for the log."""
        self.calibration = Calibration(self._given)
        self._seeds: dict[Tensor | Segment, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if "_given" not in self.__dict__:  # a copy, or from a pickle
            self._given = Given()
            for group in self.param_groups:
                self._given.add(group)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its blocks are calibrated at their own first usable gradient."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_parameters(self.param_groups[-1])
            _check_fused(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.add(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """The state of every trained block, also of one that has had no gradient yet: loaders look for every entry."""
        if self.state:
            for group in self.param_groups:
                for place, p in enumerate(group["params"]):
                    if p.requires_grad:
                        self._state_of(group, place)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SGDSaI; ``gsnr`` and ``scale`` stay float32 whatever the parameters' dtype is.

        Raises:
            ValueError: for entries that do not fit the parameters; the optimizer is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"a state dict of SGDSaI is a dict, got {state_dict!r:.80}")
        final: list[dict[str, Any]] = []

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            check_state_dict(self.param_groups, given, self._given.block_counts())
            final.append(given)

        # Registered last, so that it sees what the user's own hooks made of the state dict.
        hook = self.register_load_state_dict_pre_hook(check)
        groups = self.param_groups
        try:
            for group in groups:
                for place in range(len(group["params"])):
                    self._given.check(group, place)
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._given.replace(groups, self.param_groups)
        # torch has cast every tensor to its parameter's dtype: take the saved ones instead.
        for group, saved in zip(self.param_groups, final[0]["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in final[0]["state"]:
                    restore(self.state[p], final[0]["state"][key], p, group)

    def block_states(self) -> list[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Every block as (place in the param groups, parameter of the model, state); empty states included."""
        found: list[tuple[str, Tensor, Mapping[str, Tensor]]] = []
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                place, partition = f"param_groups[{i}].params[{j}]", self._given.partition(p)
                if partition is None:
                    found.append((place, p, self.state.get(p, {})))
                else:
                    states = partition.states(self.state[p])
                    found += [(place, q, s) for q, s in zip(partition.params, states, strict=True)]
        return found

    def release_gradients(self, model: torch.nn.Module, *, track_norm: bool = False) -> "GradientRelease":
        """Update each parameter inside ``backward`` and free its gradient at once; ``step`` then only ends the step.

        A block's first usable gradient only calibrates it, so that all three scalings work. For what this excludes
        and why, see :mod:`hf_sai.release`.

        Args:
            model: what is trained; it must hold every parameter of this optimizer.
            track_norm: keep the global norm of the gradients of each backward in ``released_norm``, on the device.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: for a model or parameters whose gradients are reduced over processes.
        """
        from hf_sai.release import GradientRelease

        if self._release is not None:
            raise ValueError("release_gradients is active already; remove() its handle first")
        self._release = GradientRelease(self, model, track_norm=track_norm)
        return self._release

    @property
    def releases_gradients(self) -> bool:
        """Whether ``release_gradients`` is active."""
        return self._release is not None

    @property
    def released_norm(self) -> Tensor | None:
        """The global norm of the gradients that the last backward has released, None where it is not tracked."""
        return None if self._release is None else self._release.norm()

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
        if self._release is not None:
            self.calibration.steps += 1
            self._release.finish()
            return loss
        taking: list[list[Taking]] = []
        for group in self.param_groups:
            found = [self.taking(group, place) for place in range(len(group["params"]))]
            taking.append([part for t in found if t is not None for part in self._parts(t)])
        plans, scaled = self.calibration.begin(
            taking,
            self.state,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        for group, plan in zip(self.param_groups, plans, strict=True):
            self.update(group, plan.first, first=True, scaled=scaled)
            self.update(group, plan.later, plan.scales, scaled=scaled)
        if late := self.calibration.late(self.param_groups[-1], self.state):
            self._update_late(late)
        return loss

    def _update_late(self, taking: Sequence[Taking]) -> None:
        """Update blocks of groups that DeepSpeed has stepped, and published, before."""
        for group in self._given.groups():
            self.update(group, [t for t in taking if t.group is group], first=True)
        for group, place in {id(t.group): (t.group, t.place) for t in taking}.values():
            partition = self._given.partition(group["params"][place])
            assert partition is not None
            partition.publish()

    def _parts(self, taking: Taking) -> tuple[Taking, ...]:
        """The blocks in a parameter where it is a partition of DeepSpeed's, else itself."""
        group, place, p, grad, state = taking
        partition = self._given.partition(p) if isinstance(p, Tensor) else None
        if partition is None or grad is None:
            return (taking,)
        parts = zip(partition.segments, partition.split(grad), partition.states(state), strict=True)
        return tuple(Taking(group, place, segment, part, own) for segment, part, own in parts)

    def taking(self, group: dict[str, Any], place: int) -> Taking | None:
        """A parameter with its gradient and its state; None if it has no part in this step."""
        p = group["params"][place]
        grad = p.grad
        if grad is None:
            # A process without a gradient still joins the collectives that calibrate or clip a sharded block.
            collective = group["clip_threshold"] is not None or not self.is_calibrated(p)
            if not (p.requires_grad and is_dtensor(p) and collective):
                return None
        elif grad.is_sparse:
            name = block_name(group, place)
            raise ValueError(
                f"SGDSaI needs dense gradients, {name} has a sparse one; build its layer with sparse=False"
            )
        elif is_dtensor(p) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        return Taking(group, place, p, grad, self._state_of(group, place)) if p.numel() else None

    def _state_of(self, group: dict[str, Any], place: int) -> dict[str, Tensor]:
        p = group["params"][place]
        state: dict[str, Tensor] | None = self.state.get(p)
        if state is None or "scale" not in state:
            self._given.check(group, place)
            partition = self._given.partition(p)
            state = self.state[p]
            allocate(state, p, group, blocks=(len(partition.segments),) if partition else ())
        return state

    def is_calibrated(self, p: Tensor) -> bool:
        """Whether a parameter that is one block has its scale."""
        return self.calibration.host_scale(p, self.state.get(p, {})) > 0.0

    def update(
        self,
        group: dict[str, Any],
        taking: list[Taking],
        known: list[float] | None = None,
        *,
        lr: Scalar | None = None,
        first: bool = False,
        scaled: bool = False,
    ) -> None:
        """Update the local part of every block of a group.

        Args:
            known: the scales, where they have been asked for already.
            lr: instead of the group's.
            first: of these blocks it is the first usable gradient, with which the momentum begins.
            scaled: whether the gradients are still multiplied by ``grad_scale``.
        """
        if not taking:
            return
        compiling, has_momentum = torch.compiler.is_compiling(), group["momentum"] > 0
        blocks = []
        host_scales = known or [0.0 if compiling else self.calibration.host_scale(t.param, t.state) for t in taking]
        for t, host_scale in zip(taking, host_scales, strict=True):
            _, _, p, g, state = t
            m = state.get("momentum_buffer") if has_momentum else None
            assert g is not None
            if type(p) is not torch.nn.Parameter:
                p, g, m = to_local(p), to_local(g), None if m is None else to_local(m)
            scale, counter = state["scale"], state.get("rounding_step")
            seed = 0 if counter is None else self._seed(t.param)
            blocks.append(
                Block(p, g, m, state.get("momentum_scale"), scale, scale if compiling else host_scale, counter, seed)
            )
        found_inf = getattr(self, "found_inf", None) if scaled else None
        update_blocks(
            blocks,
            group["foreach"],
            group["fused"],
            grad_scale=getattr(self, "grad_scale", None) if scaled else None,
            found_inf=found_inf,
            lr=group["lr"] if lr is None else lr,
            momentum=0.0 if first and group["momentum_init"] == "gradient" else group["momentum"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
        )
        counters = [b.counter for b in blocks if b.counter is not None]
        if counters:
            torch._foreach_add_(counters, 1 if found_inf is None else (found_inf.to(counters[0].device) == 0).long())

    def _seed(self, p: Tensor | Segment) -> int:
        """A number of a parameter's own: its place in the optimizer, and which of its shards this process holds."""
        if p not in self._seeds:
            params = [q for group in self.param_groups for q in group["params"]]
            self._seeds = {q: place + (shard_number(q) << 16) for place, q in enumerate(params)}
        return self._seeds[p]


def _check_fused(group: dict[str, Any]) -> None:
    for i, p in enumerate(group["params"]):
        if group["fused"] and (reason := why_not_fused(p)):
            raise ValueError(f"fused=True is impossible for {block_name(group, i)}: {reason}; leave it None")
