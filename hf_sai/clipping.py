"""Clipping a block's gradient by the size of the update that it would make, for ``SGDSaI(clip_threshold=...)``.

A scale is measured once, and a gradient that has grown since makes an update that has grown as much, where AdamW's
would not. Here the gradient of a block is scaled down to what its scale was made for: ``scale * rms(g)``, in units of
the learning rate, is kept at ``clip_threshold``. Momentum then averages clipped gradients, so no update has a larger
root mean square than that either.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sai.gsnr import reduction_groups, to_local

if TYPE_CHECKING:
    from hf_sai.calibration import Taking


def clip_gradients(taking: Sequence["Taking"], grad_scale: Tensor | None = None) -> None:
    """Scale down, in place, the gradients whose updates would be too large.

    On a GPU nothing is synchronised with the host. What is too large for float32 becomes zero, NaN stays what it is.

    Args:
        taking: calibrated blocks, on every process the same sharded ones in the same order; of a sharded one a process
            may have no gradient.
        grad_scale: what the gradients are multiplied by.
    """
    by_device: dict[torch.device, list[Taking]] = {}
    for t in taking:
        by_device.setdefault(t.state["scale"].device, []).append(t)
    for device, blocks in by_device.items():
        locals_ = [None if t.grad is None else to_local(t.grad) for t in blocks]
        factors = _factors(blocks, locals_, device, grad_scale)
        if device.type == "cpu":
            for g, factor in zip(locals_, factors.tolist(), strict=True):
                if g is not None and factor < 1.0:
                    g.mul_(factor)
        else:
            pairs = [(g, f) for g, f in zip(locals_, factors.unbind(), strict=True) if g is not None]
            if pairs:
                torch._foreach_mul_([g for g, _ in pairs], [f for _, f in pairs])


def _factors(
    blocks: Sequence["Taking"], locals_: Sequence[Tensor | None], device: torch.device, grad_scale: Tensor | None
) -> Tensor:
    """(blocks,) float32: what each gradient is to be multiplied by, at most 1."""
    # Python numbers go into kernels as they are; a tensor made of them, or an index, would be a copy from the host.
    here = [i for i, g in enumerate(locals_) if g is not None and g.numel()]
    norms = [torch.zeros((), dtype=torch.float32, device=device) for _ in blocks]
    if here:
        gradients = [g for g in locals_ if g is not None and g.numel()]
        for i, norm in zip(here, torch._foreach_norm(gradients, 2, dtype=torch.float32), strict=True):
            norms[i] = norm
    for group, (members, where) in reduction_groups([t.param for t in blocks]).items():
        squares = torch.stack([norms[i] for i in members]).to(where, torch.float64).square()
        torch.distributed.all_reduce(squares, group=group)
        for i, norm in zip(members, squares.sqrt().to(device, torch.float32).unbind(), strict=True):
            norms[i] = norm
    per_threshold = [1.0 / (math.sqrt(t.param.numel()) * t.group["clip_threshold"]) for t in blocks]
    updates = torch.stack(list(torch._foreach_mul(norms, per_threshold))) * torch.stack(
        [t.state["scale"] for t in blocks]
    )
    if grad_scale is not None:
        updates = updates / grad_scale.to(device)
    return torch.where(updates.isnan(), 1.0, updates.reciprocal().clamp(max=1.0))
