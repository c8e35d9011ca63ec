"""The update of SGD-SaI, ``m = mu*m + (1-mu)*g`` and ``p = (1 - lr*wd)*p - lr*scale*m``, one signature, several paths.

Every path takes lists of local (not ``DTensor``) tensors and changes ``params`` and ``momentum_buffers`` in place.
``momentum_buffers`` is empty where ``momentum`` is 0. ``scales`` holds one number a block: Python floats, or 0-dim
tensors under ``torch.compile``. Parameters and momentum below float32 are computed in float32 and rounded once:
``lr*wd`` alone is below the resolution of bfloat16.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sai.gsnr import chunks, dense_view

Scalar = float | Tensor

# Bytes of temporaries that the foreach path may hold at once.
_FOREACH_BYTES = 1 << 27


def update_single_tensor(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    scales: Sequence[Scalar],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One block after the other; the reference of the other paths, and the fastest on a CPU.

    No temporary of a block's size, except for strided tensors with holes below float32.
    """
    decay = 1 - lr * weight_decay
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        m = momentum_buffers[i] if momentum_buffers else None
        step = lr * scales[i]
        if _is_native(p, g, m):
            _update_block(p, g, m, decay, step, momentum, maximize)
            continue
        for p_, g_, m_ in _matching_chunks(p, g, m):
            wide = _compute_dtype(p_)
            p32, g32, m32 = p_.to(wide), g_.to(wide), None if m_ is None else m_.to(wide)
            _update_block(p32, g32, m32, decay, step, momentum, maximize)
            p_.copy_(p32)
            if m_ is not None and m32 is not None:
                m_.copy_(m32)


def update_foreach(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    scales: Sequence[Scalar],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """A few launches for many blocks at once, with temporaries of at most 128 MiB or one block."""
    decay = 1 - lr * weight_decay
    for members in _batches(params, grads, momentum_buffers):
        p, g = [params[i] for i in members], [grads[i] for i in members]
        m = [momentum_buffers[i] for i in members] if momentum_buffers else []
        native = _is_native(p[0], g[0], m[0] if m else None)
        wide = _compute_dtype(p[0])
        p32 = p if native else [x.to(wide) for x in p]
        update = g if native else [x.to(wide) for x in g]
        if maximize:
            update = list(torch._foreach_neg(update))
        if m:
            m32 = m if native else [x.to(wide) for x in m]
            torch._foreach_lerp_(m32, update, 1 - momentum)
            if not native:
                torch._foreach_copy_(m, m32)
            update = m32
        own = [scales[i] for i in members]
        steps = [-lr * s for s in own]
        if any(isinstance(s, Tensor) for s in steps):
            scaled = torch._foreach_mul(update, [torch.as_tensor(s, device=p[0].device) for s in steps])
        else:
            scaled = torch._foreach_mul(update, [float(s) for s in steps])
        torch._foreach_mul_(p32, decay)
        torch._foreach_add_(p32, scaled)
        if not native:
            torch._foreach_copy_(p, p32)


def _is_native(p: Tensor, g: Tensor, m: Tensor | None) -> bool:
    """Whether the arithmetic can run in the tensors' own dtype."""
    return p.dtype in (torch.float32, torch.float64) and g.dtype == p.dtype and (m is None or m.dtype == p.dtype)


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _update_block(
    p: Tensor, g: Tensor, m: Tensor | None, decay: Scalar, step: Scalar, momentum: float, maximize: bool
) -> None:
    if m is not None:
        if maximize:
            m.mul_(momentum).sub_(g, alpha=1 - momentum)
        else:
            m.lerp_(g, 1 - momentum)
        g = m
    elif maximize:
        step = -step
    if isinstance(step, Tensor) or isinstance(decay, Tensor):
        p.mul_(decay).addcmul_(g, torch.as_tensor(step, device=p.device, dtype=p.dtype), value=-1)
    elif p.device.type == "cpu" and p.is_contiguous() and g.is_contiguous():
        # The outer product with [1] is the one CPU operator that computes decay*p - step*m in a single pass.
        p.view(1, -1).addr_(p.new_ones(1), g.view(-1), beta=decay, alpha=-step)
    else:
        p.mul_(decay).add_(g, alpha=-step)


def _matching_chunks(p: Tensor, g: Tensor, m: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The block in pieces, so that its float32 copy is never larger than one of them."""
    tensors = [p, g] if m is None else [p, g, m]
    if len({x.stride() for x in tensors}) > 1 or any(dense_view(x).data_ptr() != x.data_ptr() for x in tensors):
        yield p, g, m
        return
    pieces = [chunks(dense_view(x)) for x in tensors]
    for piece in zip(*pieces, strict=True):
        yield piece[0], piece[1], piece[2] if m is not None else None


def _batches(params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of blocks on one device with the same dtypes, at most ``_FOREACH_BYTES`` of float32 together."""
    open_batches: dict[tuple[object, ...], list[int]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for i, p in enumerate(params):
        key = (p.device, p.dtype, grads[i].dtype, buffers[i].dtype if buffers else None)
        size = 4 * p.numel()
        if key in open_batches and sizes[key] + size > _FOREACH_BYTES:
            yield open_batches.pop(key)
            sizes[key] = 0
        open_batches.setdefault(key, []).append(i)
        sizes[key] = sizes.get(key, 0) + size
    yield from open_batches.values()
