"""When a block gets its scale, and what it is told of: once, at its first usable gradient (finite, not all zero).

What the g-SNR of a gradient is, :mod:`hf_sai.gsnr` says. Here is decided which gradient calibrates a block, what a
block does until then, how far a warm-up is made up for, and what is logged and warned of.
"""

import logging
import sys
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from hf_sai.checks import ADAMW_UNITS, SCALINGS, block_name
from hf_sai.clipping import clip_gradients
from hf_sai.gsnr import BlockStatistics, Segment, measure, scales, to_local
from hf_sai.kernels import fused_moments
from hf_sai.zero import Given

States = Mapping[Tensor, Mapping[str, Tensor]]


class Taking(NamedTuple):
    """A block that takes part in this step."""

    group: dict[str, Any]
    place: int  # in the group
    param: Tensor | Segment
    grad: Tensor | None  # None: only to join the collectives of a sharded block
    state: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.param.name if isinstance(self.param, Segment) else block_name(self.group, self.place)


class Plan(NamedTuple):
    """Which blocks of a group are updated in this step; those that wait for a usable gradient are in neither list.

    Attributes:
        first: their gradient is the first usable one, with which their momentum begins.
        later: all others.
        scales: the scales of ``later``.
    """

    first: list[Taking]
    later: list[Taking]
    scales: list[float]


class Calibration:
    """The scales of an optimizer's blocks, as floats, and the blocks that wait for one.

    Derived from the optimizer's state and begun anew when that is replaced: nothing here decides the trajectory.
    """

    def __init__(self, given: Given) -> None:
        self.steps = 0  # since this object exists, for the log
        self._given = given
        # By id, which is faster than by tensor; whether it is still the same scale is asked anyway.
        self._host_scales: dict[int, tuple[Tensor, int, float]] = {}
        self._deferred: list[tuple[Taking, BlockStatistics]] = []
        self._late: list[Taking] = []
        self._warned: set[str] = set()

    def host_scale(self, p: Tensor | Segment, state: Mapping[str, Tensor]) -> float:
        """The scale of a block, 0.0 while it is not calibrated; synchronises only where the state has changed."""
        scale = state.get("scale")
        if scale is None:
            return 0.0
        known = self._host_scales.get(id(p))
        if known is None or known[0] is not scale or known[1] != scale._version:
            known = self._host_scales[id(p)] = (scale, scale._version, scale.item())
        return known[2] if known[2] > 0.0 else 0.0  # negative while a block waits in a warm-up: see wait

    # torch.compiler.disable would import the compiler together with this package; torch.optim uses this one too.
    @_disable_dynamo
    def begin(
        self,
        taking: Sequence[Sequence[Taking]],
        states: States,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[list[Plan], bool]:
        """Begin a step: set the scales of the blocks that wait for one and have a usable gradient.

        The gradients of blocks that had theirs before are clipped where their group asks for it.

        Args:
            taking: the blocks of this step, group by group.
            states: the optimizer's state.
            grad_scale: what the gradients are multiplied by; they are divided by it where a block is calibrated.
            found_inf: where it is not 0 no block is calibrated.

        Returns:
            What to do in each group, and whether the gradients are still multiplied by ``grad_scale``.

        Raises:
            RuntimeError: for a block that is not calibrated under CUDA graph capture.
        """
        self.steps += 1
        plans, waiting, clipped = [], [], []
        for members in taking:
            plan = Plan([], [], [])
            for t in members:
                scale = self.host_scale(t.param, t.state)
                if not scale:
                    waiting.append((t, plan))
                    continue
                if t.group["clip_threshold"] is not None:
                    clipped.append(t)
                if t.grad is not None:
                    plan.later.append(t)
                    plan.scales.append(scale)
            plans.append(plan)
        if clipped:
            clip_gradients(clipped, grad_scale)
        if not waiting:
            return plans, True
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{waiting[0][0].name} is not calibrated yet, which a CUDA graph cannot capture; "
                "run steps before capturing until every block has had a gradient that is not all zero"
            )
        if found_inf is not None and found_inf.item():
            return [Plan([], [], []) for _ in plans], True
        if grad_scale is not None:
            for grad in [t.grad for members in taking for t in members if t.grad is not None]:
                local = to_local(grad)
                local.div_(grad_scale.to(local.device))
        kinds = self._calibrate([t for t, _ in waiting], states)
        for (t, plan), kind in zip(waiting, kinds, strict=True):
            if t.grad is None:
                continue
            if kind in ("usable", "constant"):
                plan.first.append(t)
            elif kind == "zero":  # with a scale of 0: only the weight decay
                plan.later.append(t)
                plan.scales.append(0.0)
        return plans, False

    def _calibrate(self, taking: list[Taking], states: States) -> list[str]:
        """Measure gradients and set the scales of those that are usable; returns the kind of each."""
        params, eps = [t.param for t in taking], [t.group["eps"] for t in taking]
        active = [t.group["scaling"] == "floor" for t in taking]
        statistics = measure(params, [t.grad for t in taking], eps, fused_moments, active)
        measured = list(zip(taking, statistics, strict=True))
        if isinstance(taking[0].param, Segment) and not self._given.is_last(taking[0].group):
            self._deferred += measured
            return ["zero" if s.kind == "zero" else "deferred" for s in statistics]
        self._with_deferred(measured, states)
        return [s.kind for s in statistics]

    def _with_deferred(self, measured: list[tuple[Taking, BlockStatistics]], states: States) -> None:
        """Set the scales of these blocks and of those in groups that DeepSpeed stepped before."""
        self.set_scales(self._deferred + measured, states)
        self._late = [t for t, s in self._deferred if s.kind in ("usable", "constant")]
        self._deferred = []

    def late(self, last_group: dict[str, Any], states: States) -> list[Taking]:
        """End a step of groups up to ``last_group``: the blocks of earlier steps that have got their scales in it.

        DeepSpeed steps one group after the other, and scales can depend on all of them: what has its first usable
        gradient in an earlier group waits for the last one, and is updated then.
        """
        if self._deferred and self._given.is_last(last_group):
            self._with_deferred([], states)
        if not self._late:
            return []
        late, self._late = self._late, []
        return late

    def set_scales(self, measured: list[tuple[Taking, BlockStatistics]], states: States) -> None:
        """Calibrate blocks from the statistics of their first gradients, and warn of what is odd about them."""
        for t, s in measured:
            if s.kind == "zero" and t.group["scaling"] in ADAMW_UNITS:
                wait(t.state, t.group)
        for scaling in SCALINGS:
            usable = [(t, s) for t, s in measured if t.group["scaling"] == scaling and s.kind in ("usable", "constant")]
            if usable:
                self._set_scales(scaling, *zip(*usable, strict=True), states=states)
        self._warn(
            "has a constant first gradient, whose g-SNR is taken as sqrt(numel)",
            [t.name for t, s in measured if s.kind == "constant"],
        )
        self._warn(
            "has NaN or infinite elements in its first gradient; it is left as it is until its gradient is finite",
            [t.name for t, s in measured if s.kind == "nonfinite"],
        )

    def _set_scales(
        self, scaling: str, blocks: tuple[Taking, ...], statistics: tuple[BlockStatistics, ...], *, states: States
    ) -> None:
        calibrated = [
            state["gsnr"].max().item()
            for group in self._given.groups()
            if group["scaling"] == scaling == "max"
            for p in group["params"]
            if (state := states.get(p))
        ]
        values = scales(statistics, scaling, max(calibrated, default=0.0))
        if scaling in ADAMW_UNITS:
            waited = [-self._host_scales[id(b.param)][2] for b in blocks]
            values = [v * warmup_share(w, b.group) for v, w, b in zip(values, waited, blocks, strict=True)]
        gsnr_tensors, scale_tensors = [b.state["gsnr"] for b in blocks], [b.state["scale"] for b in blocks]
        torch._foreach_zero_(gsnr_tensors + scale_tensors)
        torch._foreach_add_(gsnr_tensors, [s.gsnr for s in statistics])
        torch._foreach_add_(scale_tensors, values)
        for block, scale in zip(blocks, torch.tensor(values, dtype=torch.float32).tolist(), strict=True):
            self._host_scales[id(block.param)] = (block.state["scale"], block.state["scale"]._version, scale)
        gsnrs = [s.gsnr for s in statistics]
        message = (
            f"SGDSaI calibrated {len(blocks)} blocks at step {self.steps}: "
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


def wait(state: MutableMapping[str, Tensor], group: dict[str, Any]) -> None:
    """Note that a block's gradient was all zero while the others were updated with the group's learning rate.

    The sum of these learning rates is kept, negated, in ``scale``, which an uncalibrated block does not use. Where
    momentum begins at zero, each is multiplied by how far the momentum of the others has got, 1 - momentum^steps, which
    is kept, negated, in ``gsnr``.
    """
    if group["momentum_init"] == "zero":
        state["gsnr"].mul_(group["momentum"]).sub_(1.0 - group["momentum"])
        state["scale"].add_(state["gsnr"] * group["lr"])
    else:
        state["scale"].sub_(group["lr"])


def warmup_share(waited: float, group: dict[str, Any]) -> float:
    """How far the other blocks moved while this one waited, as a share of a step at the peak learning rate.

    The gradient of LoRA's A is proportional to B, which starts at zero. After one step at 1/500 of the learning rate
    it is 500 times smaller than after one at the whole, and a scale that made up for it would be 500 times too large
    when the warm-up ends. Where no scheduler says what the peak is, it is taken to be the present learning rate. 1.0
    for a block that did not wait.
    """
    peak = _peak_lr(group) or float(group["lr"])
    return min(1.0, waited / peak) if waited > 0 and peak > 0 else 1.0


def _peak_lr(group: dict[str, Any]) -> float:
    """The learning rate that a scheduler starts from or warms up to, 0.0 without a scheduler."""
    return float(max(group.get("initial_lr", 0.0), group.get("max_lr", 0.0)))


def _logger() -> logging.Logger:
    """transformers' logger where that library is in use, else one of our own."""
    if "transformers" in sys.modules:
        logger: logging.Logger = sys.modules["transformers"].utils.logging.get_logger("transformers.hf_sai")
        return logger
    return logging.getLogger("hf_sai")
