"""Gradient release: each parameter is updated inside ``backward``, and its gradient is freed at once.

The gradients of a whole model then never exist together: full fine-tuning needs the parameters, the momentum, one
gradient and the activations. The optimizer stays one object, so that learning-rate schedulers, ``state_dict`` and
``gsnr_table`` work as always; ``step`` ends the step, which is when scales are set.

A block's first usable gradient only calibrates it: its momentum begins with it, its parameter does not change.
All blocks are measured before any moves, as every scaling but ``"raw"`` needs. The training is the ordinary one
with a learning rate of 0 in the first step.

What it excludes, because an update inside backward comes too early for it:

- gradient accumulation: the parameters would move between the micro-batches. A second backward before ``step`` raises.
- clipping by the global norm: the norm is known only after the last gradient. ``clip_grad_norm_`` finds no gradients
  and does nothing; ``SaITrainer`` refuses ``max_grad_norm > 0``. ``clip_threshold`` clips each block by its own.
- DDP and FSDP: gradients are reduced over processes after they have been accumulated.
- ``GradScaler``: whether a gradient overflowed is known only after the last one. Use bfloat16.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_sai.checks import block_name
from hf_sai.clipping import clip_gradients
from hf_sai.gsnr import BlockStatistics, is_dtensor, measure
from hf_sai.kernels import fused_moments

if TYPE_CHECKING:
    from hf_sai.calibration import Taking
    from hf_sai.optimizer import SGDSaI


class GradientRelease:
    """The hooks of :meth:`hf_sai.SGDSaI.release_gradients`; ``remove()`` ends it."""

    def __init__(self, optimizer: "SGDSaI", model: nn.Module, *, track_norm: bool) -> None:
        self._optimizer = optimizer
        self._track_norm = track_norm
        self._released: set[Tensor] = set()
        self._squares: list[Tensor] = []
        self._norm: Tensor | None = None
        self._measured: list[tuple[Taking, BlockStatistics]] = []
        _check_model(optimizer, model)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(group, place))
            for group in optimizer.param_groups
            for place, p in enumerate(group["params"])
            if p.requires_grad
        ]

    def remove(self) -> None:
        """Take the hooks away: from now on ``step`` updates the parameters, from gradients that backward keeps."""
        for hook in self._hooks:
            hook.remove()
        if self._optimizer._release is self:
            self._optimizer._release = None

    def norm(self) -> Tensor | None:
        """The global norm of the gradients of the last backward, on the device; None where it is not tracked."""
        if self._squares:
            device = self._squares[0].device
            self._norm = torch.stack([x.to(device) for x in self._squares]).sum().sqrt()
        return self._norm

    def finish(self) -> None:
        """End the step: set the scales of the blocks that this backward has measured."""
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "release_gradients cannot be used with GradScaler, which knows of an overflow only after the last "
                "gradient, when parameters have been updated; train in bfloat16 without it"
            )
        for group in optimizer.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is not None:
                    raise RuntimeError(
                        f"{block_name(group, place)} has a gradient that release_gradients did not see: it was set by "
                        "hand, or needed none when the hooks were made; remove() them, and release again"
                    )
        if self._measured:
            optimizer.calibration.set_scales(self._measured, optimizer.state)
        self.norm()
        self._measured.clear()
        self._released.clear()
        self._squares.clear()

    def _hook(self, group: dict[str, Any], place: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def release(p: Tensor) -> None:
            optimizer = self._optimizer
            if p in self._released:
                raise RuntimeError(
                    f"{block_name(group, place)} got a second gradient before step(): release_gradients updates "
                    "parameters inside backward, so gradients cannot be accumulated; call step() after each backward "
                    "(gradient_accumulation_steps=1), and checkpoint activations with use_reentrant=False"
                )
            self._released.add(p)
            taking = optimizer.taking(group, place)
            if taking is not None and taking.grad is not None:
                if self._track_norm:
                    self._squares.append(torch.linalg.vector_norm(taking.grad, dtype=torch.float32).square())
                if optimizer.is_calibrated(p):
                    if group["clip_threshold"] is not None:
                        clip_gradients([taking])
                    optimizer.update(group, [taking])
                else:
                    self._calibrate(taking)
            p.grad = None

        return release

    def _calibrate(self, taking: "Taking") -> None:
        group = taking.group
        active = [group["scaling"] == "floor"]
        (statistics,) = measure([taking.param], [taking.grad], [group["eps"]], fused_moments, active)
        self._measured.append((taking._replace(grad=None), statistics))
        if statistics.kind in ("usable", "constant"):
            # The momentum begins with the gradient; with a learning rate of 0 the parameter stays what it is.
            self._optimizer.update(group, [taking], lr=0.0, first=True)


def _check_model(optimizer: "SGDSaI", model: nn.Module) -> None:
    """Raise ValueError for what cannot be right; see the head of this file."""
    held = set(model.parameters())
    for group in optimizer.param_groups:
        for place, p in enumerate(group["params"]):
            if p not in held:
                raise ValueError(f"release_gradients: the model does not hold {block_name(group, place)}")
            if is_dtensor(p):
                raise ValueError(_REDUCED.format(what="a sharded model (FSDP)"))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(_REDUCED.format(what="DistributedDataParallel"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(_REDUCED.format(what=f"{processes} processes"))


_REDUCED = (
    "release_gradients cannot be used with {what}: it updates each parameter as soon as its own process has the "
    "gradient, before gradients are reduced over processes; train on one device, or without it"
)
