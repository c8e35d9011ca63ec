"""The update of SGD-SaI, ``m = mu*m + (1-mu)*g`` and ``p = (1 - lr*wd)*p - lr*scale*m``, one signature, several paths.

Every path takes a list of blocks with local (not ``DTensor``) tensors and changes their parameters and momentum in
place. Whatever is stored below float32 is computed in float32 and rounded once: ``lr*wd`` alone is below the resolution
of bfloat16. The fused path is in :mod:`hf_sai.fused`, which is imported when it is first used.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.gsnr import chunks, dense_view
from hf_sai.momentum import decode, encode, scale_count
from hf_sai.rounding import random_bits, rounding_key, stochastic_bfloat16

Scalar = float | Tensor

# Bytes of temporaries that the foreach path may hold at once.
_FOREACH_BYTES = 1 << 27
# Elements that the per-tensor path takes through both of its passes at once on a CPU: p, g and m of a piece stay in the
# cache between them, so that memory is read and written once, and the pieces are few enough for their launches not to
# count.
_CPU_PIECE = 1 << 21
# What torch.optim.SGD(fused=True) calls, on a CPU since torch 2.4; the name is private, so it may go.
_torch_fused_sgd = getattr(torch, "_fused_sgd_", None)


class Block(NamedTuple):
    """What a path needs to know of one block."""

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None  # None where momentum is 0
    momentum_scale: Tensor | None  # with an int8 momentum_buffer only
    scale: Tensor  # 0-dim float32
    host_scale: Scalar  # the same as a Python float; under torch.compile the tensor
    counter: Tensor | None  # updates so far, 0-dim; None where nothing is rounded stochastically
    seed: int


def update_single_tensor(
    blocks: Sequence[Block],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """One block after the other; the reference of the other paths.

    No temporary of a block's size, except for tensors in different memory formats and tensors with holes.
    """
    decay = 1 - lr * weight_decay
    for b in blocks:
        p, g, m = b.param, b.grad, b.momentum_buffer
        step = lr * b.host_scale
        if _is_native(b):
            whole = not p.is_cpu or p.numel() <= _CPU_PIECE or torch.compiler.is_compiling()
            for p_, g_, m_, _ in [(p, g, m, 0)] if whole else _pieces(p, g, m, _CPU_PIECE):
                _update_piece(p_, g_, m_, decay, step, momentum, maximize)
            continue
        key = None if b.counter is None else rounding_key(b.counter, b.seed)
        wide = _compute_dtype(p)
        for p_, g_, m_, start in _pieces(p, g, m):
            codes = None if m_ is None or b.momentum_scale is None else (m_.view(-1), _scales_of(b, m_, start))
            p32, g32 = p_.to(wide), g_.to(wide)
            m32 = None if m_ is None else (decode(*codes).view(m_.shape) if codes else m_).to(wide)
            _update_piece(p32, g32, m32, decay, step, momentum, maximize)
            bits = None if key is None else random_bits(key, start, p_.numel()).view(p_.shape)
            _store(p_, p32, bits if stochastic_rounding else None)
            if codes and m32 is not None and bits is not None:
                encode(m32.reshape(-1).float(), *codes, bits.view(-1))
            elif m_ is not None and m32 is not None:
                # The other half of the bits: the two roundings of an element must not go the same way.
                _store(m_, m32, bits >> 16 if stochastic_rounding and bits is not None else None)


def update_cpu(
    blocks: Sequence[Block],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """One block after the other, in a single pass over memory by torch's own fused SGD kernel where it is of use.

    It is of use where nothing decays (biases, norms, and everything by the Trainer's default), because the decay of
    that kernel goes into the momentum, and where there is momentum, without which the per-tensor path has one pass too.
    """
    rest = []
    constant = not (isinstance(lr, Tensor) or torch.compiler.is_compiling()) and lr * weight_decay == 0
    for b in blocks:
        p, g, m = b.param, b.grad, b.momentum_buffer
        if not constant or m is None or _torch_fused_sgd is None or not _fits_torch_fused(p, g, m):
            rest.append(b)
            continue
        _torch_fused_sgd(
            [p],
            [g],
            [m],
            weight_decay=0.0,
            momentum=momentum or 1.0,  # the kernel asks whether there is any; in a first step it takes the gradient
            lr=lr * b.host_scale,
            dampening=momentum,
            nesterov=False,
            maximize=maximize,
            is_first_step=momentum == 0,
        )
    if rest:
        update_single_tensor(
            rest,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
        )


def update_foreach(
    blocks: Sequence[Block],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """A few launches for many blocks at once, with temporaries of at most 128 MiB or one block.

    Blocks that round stochastically are updated one after the other.
    """
    decay = 1 - lr * weight_decay
    for batch in _batches([b for b in blocks if b.counter is None]):
        p, g = [b.param for b in batch], [b.grad for b in batch]
        m = [b.momentum_buffer for b in batch if b.momentum_buffer is not None]
        native = _is_native(batch[0])
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
        steps = [-lr * b.host_scale for b in batch]
        if any(isinstance(s, Tensor) for s in steps):
            scaled = torch._foreach_mul(update, [torch.as_tensor(s, device=p[0].device) for s in steps])
        else:
            scaled = torch._foreach_mul(update, [float(s) for s in steps])
        torch._foreach_mul_(p32, decay)
        torch._foreach_add_(p32, scaled)
        if not native:
            torch._foreach_copy_(p, p32)
    update_single_tensor(
        [b for b in blocks if b.counter is not None],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic_rounding=stochastic_rounding,
    )


def update_blocks(
    blocks: Sequence[Block],
    foreach: bool | None,
    fused: bool | None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **hyper: Any,
) -> None:
    """Update ``blocks``, each by the path that ``foreach``, ``fused`` and its own tensors allow.

    ``fused=None`` and ``foreach=None`` both None: fused where :func:`why_not_fused` has no objection on CUDA, else
    foreach on CUDA, else per tensor, on a CPU with torch's fused kernel where it fits. ``fused=True`` leaves only
    blocks whose parameter, gradient and momentum differ in memory format, or have holes, to the other paths;
    ``fused=False`` excludes both fused kernels.

    Args:
        grad_scale: one element; what gradients are divided by (GradScaler's scale; a clip coefficient's inverse).
        found_inf: one element; where it is not 0 nothing is changed.
    """
    wanted = fused if fused is not None else not foreach and all(b.param.is_cuda for b in blocks)
    by_triton: Sequence[Block] = ()
    rest = blocks
    if wanted and _has_triton() and not torch.compiler.is_compiling():
        by_triton = [b for b in blocks if fits_fused(b)]
        rest = [b for b in blocks if not fits_fused(b)] if len(by_triton) < len(blocks) else ()
    if by_triton:
        from hf_sai.fused import update_fused

        update_fused(by_triton, grad_scale=grad_scale, found_inf=found_inf, **hyper)
    if not rest or (found_inf is not None and found_inf.item()):
        return
    if grad_scale is not None:
        torch._foreach_div_([b.grad for b in rest], grad_scale.to(rest[0].grad.device))
    if foreach is None:
        foreach = all(b.param.is_cuda for b in rest)
    (update_foreach if foreach else update_single_tensor if fused is False else update_cpu)(rest, **hyper)


_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits_fused(b: Block) -> bool:
    """Whether the fused path can update a block: its tensors lie in memory alike, without holes."""
    p, g, m = b.param, b.grad, b.momentum_buffer
    if p.dtype not in _FUSED_DTYPES or g.dtype not in _FUSED_DTYPES or (m is not None and m.dtype == torch.float64):
        return False
    if not p.is_cuda and why_not_fused(p):
        return False
    if p.is_contiguous() and g.is_contiguous() and (m is None or m.is_contiguous()):
        return True
    alike = p.stride() == g.stride() and (m is None or (m.stride() == p.stride() and b.momentum_scale is None))
    return alike and torch.ops.aten.is_non_overlapping_and_dense(p)


def fused_moments(grads: Sequence[Tensor | None]) -> dict[int, tuple[float, float]]:
    """The sum, and the sum of squares about the mean, of each one-dimensional gradient that the fused path takes."""
    able = {i: g for i, g in enumerate(grads) if g is not None and g.numel() and why_not_fused(g) is None}
    if not able:
        return {}
    from hf_sai.fused import gradient_moments

    return dict(zip(able, gradient_moments(list(able.values())), strict=True))


def why_not_fused(param: Tensor) -> str | None:
    """What keeps the fused path from a parameter, None if nothing does."""
    if not param.is_cuda and not (param.is_cpu and triton_is_interpreted()):
        return f"it is on {param.device.type}, and the fused path is for CUDA"
    if not _has_triton():
        return "Triton is not installed"
    if param.dtype not in _FUSED_DTYPES:
        return f"its dtype is {param.dtype}, and the fused path computes in float32"
    return None


def _fits_torch_fused(p: Tensor, g: Tensor, m: Tensor) -> bool:
    """Whether torch's fused CPU kernel, which looks at addresses and counts only, does to them what is meant."""
    return (
        p.is_cpu
        and p.dtype in (torch.float32, torch.float64)
        and p.dtype == g.dtype == m.dtype
        and p.is_contiguous()
        and g.is_contiguous()
        and m.is_contiguous()
    )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def triton_is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as it does for debugging and in this package's tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_native(b: Block) -> bool:
    """Whether the arithmetic can run in the tensors' own dtype."""
    p, m = b.param, b.momentum_buffer
    same = b.grad.dtype == p.dtype and (m is None or m.dtype == p.dtype)
    return same and p.dtype in (torch.float32, torch.float64)


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _update_piece(
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
    elif p.is_cpu and p.is_contiguous() and g.is_contiguous():
        # The outer product with [1] is the one CPU operator that computes decay*p - step*m in a single pass.
        p.view(1, -1).addr_(_one(p.dtype), g if g.dim() == 1 else g.view(-1), beta=decay, alpha=-step)
    else:
        p.mul_(decay).add_(g, alpha=-step)


@cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype)


def _store(target: Tensor, values: Tensor, bits: Tensor | None) -> None:
    """Write float32 values, rounded to nearest, or with ``bits`` stochastically if the target is bfloat16."""
    if bits is not None and target.dtype == torch.bfloat16:
        values = stochastic_bfloat16(values, bits)
    target.copy_(values)


def _scales_of(b: Block, piece: Tensor, start: int) -> Tensor:
    """The scales of a piece of an int8 momentum buffer; pieces begin at multiples of 128 elements."""
    assert b.momentum_scale is not None
    first = scale_count(start)
    return b.momentum_scale[first : first + scale_count(piece.numel())]


def _pieces(
    p: Tensor, g: Tensor, m: Tensor | None, size: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int]]:
    """The block in pieces and where each begins, so that its float32 copy is never larger than one of them."""
    tensors = [p, g] if m is None else [p, g, m]
    if all(x.is_contiguous() for x in tensors):
        views = [x.view(-1) for x in tensors]
    elif len({x.stride() for x in tensors}) > 1 or any(dense_view(x).data_ptr() != x.data_ptr() for x in tensors):
        yield p, g, m, 0
        return
    else:
        views = [dense_view(x) for x in tensors]
    start = 0
    for piece in zip(*(torch.split(x, size) if size else chunks(x) for x in views), strict=True):
        yield piece[0], piece[1], piece[2] if m is not None else None, start
        start += piece[0].numel()


def _batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks on one device with the same dtypes, at most ``_FOREACH_BYTES`` of float32 together."""
    open_batches: dict[tuple[object, ...], list[Block]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for b in blocks:
        m = b.momentum_buffer
        key = (b.param.device, b.param.dtype, b.grad.dtype, None if m is None else m.dtype)
        size = 4 * b.param.numel()
        if key in open_batches and sizes[key] + size > _FOREACH_BYTES:
            yield open_batches.pop(key)
            sizes[key] = 0
        open_batches.setdefault(key, []).append(b)
        sizes[key] = sizes.get(key, 0) + size
    yield from open_batches.values()
