"""The update and its paths without Triton. All paths have the same signature; their results differ only by rounding.

For each element, where ``s`` is the scale of its channel::

    u = clamp(s * g, -limit, limit)        (g = -g first if maximize; no clamp without a limit)
    m = m + weight * (u - m)               (m = u without momentum)
    p = (1 - lr * weight_decay) * p - lr * m

Every path takes local tensors (not ``DTensor``), writes parameters and momentum in place, and does not modify
gradients. Values that are stored with less precision than float32 are computed in float32 and rounded once, because
``lr * weight_decay`` is below the resolution of bfloat16.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sai.momentum import CODE_BLOCK, decode, encode, scale_count
from hf_sai.options import Hyper
from hf_sai.rounding import random_bits, rounding_key, stochastic_bfloat16

# The number of elements that the plain path updates at once on a CPU. Such a piece stays in cache between operations,
# so p, g and m are read from memory once. It is also large enough that launch overhead does not matter.
_CPU_PIECE = 1 << 20
# The largest size in bytes of the foreach path's temporaries.
_FOREACH_BYTES = 1 << 27
# torch.optim.SGD(fused=True) calls this, on a CPU since torch 2.4. The name is private; without it we make two passes.
_torch_fused_sgd = getattr(torch, "_fused_sgd_", None)


class Blocks(NamedTuple):
    """Blocks of one shape, dtype and device that are updated together.

    Attributes:
        params: the parameters, each of shape ``shape``.
        grads: their gradients, of the same shape, real floating point.
        momentum: (blocks, *shape), or None if momentum is 0.
        scale: (blocks, *shape with the dimensions of a channel reduced to 1), float32.
        columns: the length of a row of each matrix.
        rows: the number of rows of each matrix if a channel is a column, 0 if a channel is a row.
        momentum_scale: float32, for int8 momentum only. Then there is only one block.
        counter: the number of updates so far, 0-dim int64, for stochastic rounding only. Then there is only one block.
        seed: distinguishes the random bits of blocks.
        column_factor: (blocks, 1, columns), float32, for matrices only: an extra factor for the elements of a column.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum: Tensor | None
    scale: Tensor
    columns: int
    rows: int
    momentum_scale: Tensor | None = None
    counter: Tensor | None = None
    seed: int = 0
    column_factor: Tensor | None = None


def update_plain(many: Sequence[Blocks], hyper: Hyper) -> None:
    """Update each element of ``many`` with torch operations. This path is the reference for the others."""
    for blocks in many:
        if not is_native(blocks):
            for piece in _pieces(blocks):
                _update_wide(*piece, hyper)
        elif len(blocks.params) == 1 and _is_large(blocks):
            _update_in_pieces(blocks, hyper)
        else:
            _update_stacked(blocks, hyper)


def _update_stacked(blocks: Blocks, hyper: Hyper) -> None:
    """Update small blocks in their own dtype, with a few operations for all of them."""
    scale = blocks.scale.to(blocks.params[0].dtype)
    scratch = torch.stack(list(blocks.grads)).mul_(scale) if len(blocks.grads) > 1 else blocks.grads[0][None] * scale
    if blocks.column_factor is not None:
        scratch.mul_(blocks.column_factor.to(scale.dtype))
    _limit(scratch, hyper)
    update = scratch if blocks.momentum is None else blocks.momentum.lerp_(scratch, hyper.weight)
    params = list(blocks.params)
    if isinstance(hyper.lr, Tensor) and not params[0].is_cpu:
        lr = hyper.lr.to(params[0].device)
        torch._foreach_mul_(params, 1 - lr * hyper.weight_decay)
        torch._foreach_sub_(params, list((update * lr).unbind()))
    elif (decay := float(hyper.lr) * hyper.weight_decay) == 0:
        torch._foreach_add_(params, list(update.unbind()), alpha=-float(hyper.lr))
    else:
        # (1 - decay) * p - lr * m in one pass, as p + decay * (-m / weight_decay - p).
        target = torch.mul(update, -1 / hyper.weight_decay, out=scratch)
        torch._foreach_lerp_(params, list(target.unbind()), decay)


def _update_in_pieces(blocks: Blocks, hyper: Hyper) -> None:
    """Update one large contiguous block on a CPU, reading and writing every piece once."""
    lr, decay = float(hyper.lr), 1 - float(hyper.lr) * float(hyper.weight_decay)
    scratch = torch.empty(0)
    columns = None if blocks.column_factor is None else blocks.column_factor[0].to(blocks.params[0].dtype)
    for p, g, m, s in _matrices(blocks):
        rows = max(1, _CPU_PIECE // max(1, p.shape[1]))
        if not scratch.numel():
            scratch = torch.empty(min(rows, p.shape[0]), p.shape[1], dtype=p.dtype, device=p.device)
        for i in range(0, p.shape[0], rows):
            p_, g_ = p[i : i + rows], g[i : i + rows]
            s_ = s[i : i + rows] if s.shape[0] > 1 else s
            update = torch.mul(g_, s_, out=scratch[: p_.shape[0]])
            if columns is not None:
                update.mul_(columns)
            _limit(update, hyper)
            if m is None:
                p_.mul_(decay).sub_(update, alpha=lr)
                continue
            m_ = m[i : i + rows]
            if decay == 1 and _torch_fused_sgd is not None and hyper.weight < 1:
                # This updates momentum and parameter in one pass.
                _torch_fused_sgd(
                    [p_], [update], [m_], weight_decay=0.0, momentum=1 - hyper.weight, lr=lr,
                    dampening=1 - hyper.weight, nesterov=False, maximize=False, is_first_step=False,
                )  # fmt: skip
                continue
            m_.lerp_(update, hyper.weight)
            # The outer product with [1] computes decay * p - lr * m in one pass on a CPU.
            one = torch.ones(1, dtype=p.dtype, device=p.device)
            p_.view(1, -1).addr_(one, m_.view(-1), beta=decay, alpha=-lr)


def _update_wide(
    p: Tensor, g: Tensor, m: Tensor | None, s: Tensor, codes: Tensor | None, bits: Tensor | None, hyper: Hyper
) -> None:
    """Update a block of any dtypes and strides in float32 (float64 for float64 parameters), with one rounding.

    Args:
        p: the parameter, or a piece of it; modified in place.
        g: its gradient.
        m: its momentum; modified in place.
        s: scales that broadcast against ``p``.
        codes: the scales of an int8 ``m``; modified in place.
        bits: random int32 bits of the shape of ``p``, for stochastic rounding.
        hyper: the hyper-parameters of the group.
    """
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    update = _scaled(g.to(wide), s.to(wide), hyper)
    if m is not None:
        held = decode(m.view(-1), codes).view(m.shape) if codes is not None else m.to(wide)
        update = held + (update - held) * hyper.weight
        if codes is not None:
            assert bits is not None
            encode(update.reshape(-1).float(), m.view(-1), codes, bits.view(-1))
        else:
            # This uses the other half of the bits, because the two roundings of an element must be independent.
            _store(m, update, bits >> 16 if hyper.stochastic_rounding and bits is not None else None)
    lr: float | Tensor = hyper.lr.to(p.device) if isinstance(hyper.lr, Tensor) else float(hyper.lr)
    moved = p.to(wide) * (1 - lr * hyper.weight_decay) - lr * update
    _store(p, moved, bits if hyper.stochastic_rounding else None)


def update_foreach(many: Sequence[Blocks], hyper: Hyper) -> None:
    """Update many blocks with a few launches. Temporaries take at most 128 MiB or the size of one block.

    The plain path updates blocks that need rounding or are not contiguous.
    """
    able = [b for b in many if is_native(b)]
    update_plain([b for b in many if not is_native(b)], hyper)
    for batch in _within_memory(able):
        params = [p for b in batch for p in b.params]
        momenta = [m for b in batch if b.momentum is not None for m in b.momentum.unbind()]
        scales = [s.to(p.dtype) for b in batch for p, s in zip(b.params, b.scale.unbind(), strict=True)]
        update = list(torch._foreach_mul([g for b in batch for g in b.grads], scales))
        factors = [f for b in batch for f in ([None] * len(b.params) if b.column_factor is None else b.column_factor)]
        having = [(u, f.to(u.dtype)) for u, f in zip(update, factors, strict=True) if f is not None]
        if having:
            torch._foreach_mul_([u for u, _ in having], [f for _, f in having])
        if hyper.maximize:
            torch._foreach_neg_(update)
        if hyper.limit is not None:
            torch._foreach_clamp_max_(update, hyper.limit)
            torch._foreach_clamp_min_(update, -hyper.limit)
        if momenta:
            torch._foreach_lerp_(momenta, update, hyper.weight)
            update = momenta
        if isinstance(hyper.lr, Tensor) and not params[0].is_cpu:
            lr = hyper.lr.to(params[0].device)
            torch._foreach_mul_(params, 1 - lr * hyper.weight_decay)
            torch._foreach_sub_(params, torch._foreach_mul(update, lr))
        else:
            torch._foreach_mul_(params, 1 - float(hyper.lr) * float(hyper.weight_decay))
            torch._foreach_add_(params, update, alpha=-float(hyper.lr))


def is_native(blocks: Blocks) -> bool:
    """Whether the update can run in the tensors' own dtype and layout."""
    p, m = blocks.params[0], blocks.momentum
    if p.dtype not in (torch.float32, torch.float64) or (m is not None and m.dtype != p.dtype):
        return False
    if blocks.counter is not None or (len(blocks.params) == 1 and not p.is_contiguous()):
        return False
    return all(g.dtype == p.dtype for g in blocks.grads) and (
        len(blocks.params) > 1 or (blocks.grads[0].is_contiguous() and (m is None or m.is_contiguous()))
    )


def _is_large(blocks: Blocks) -> bool:
    p = blocks.params[0]
    return p.is_cpu and p.dim() > 0 and p.numel() > _CPU_PIECE // 8


def _scaled(grads: Tensor, scale: Tensor, hyper: Hyper) -> Tensor:
    """The scaled and limited gradient as a new tensor."""
    return _limit(grads * scale.to(grads.dtype), hyper)


def _limit(update: Tensor, hyper: Hyper) -> Tensor:
    if hyper.limit is not None:
        update.clamp_(-hyper.limit, hyper.limit)
    return update.neg_() if hyper.maximize else update


def _matrices(blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Parameter, gradient, momentum and scale of one contiguous block, as matrices."""
    s = blocks.scale[0].to(blocks.params[0].dtype)
    tensors = [blocks.params[0], blocks.grads[0], *([] if blocks.momentum is None else [blocks.momentum[0]])]
    if not blocks.rows:
        # With one scale for all elements the block has one row, which could not be split into pieces.
        p, g, *m = (x.view(-1, blocks.columns if s.numel() > 1 else 1) for x in tensors)
        yield p, g, m[0] if m else None, s.reshape(-1, 1)
        return
    stacks = [x.view(-1, blocks.rows, blocks.columns) for x in tensors]
    for p, g, *m, s_ in zip(*stacks, s.reshape(-1, 1, blocks.columns), strict=True):
        yield p, g, m[0] if m else None, s_


def _pieces(
    blocks: Blocks,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]]:
    """The arguments of :func:`_update_wide`, split into pieces with small float32 copies if the layout allows it."""
    key = None if blocks.counter is None else rounding_key(blocks.counter, blocks.seed)
    for k, (p, g) in enumerate(zip(blocks.params, blocks.grads, strict=True)):
        m = None if blocks.momentum is None else blocks.momentum[k]
        s, codes = blocks.scale[k], blocks.momentum_scale
        if blocks.column_factor is not None:
            s = s * blocks.column_factor[k]
        tensors = [p, g] if m is None else [p, g, m]
        if p.dim() != 2 or not all(x.is_contiguous() for x in tensors):
            bits = None if key is None else random_bits(key, 0, p.numel()).view(p.shape)
            if codes is not None and not (m is not None and m.is_contiguous()):
                raise AssertionError("int8 momentum must be contiguous")
            yield p, g, m, s, codes, bits
            continue
        # Every 128 codes of int8 momentum share a scale, so pieces start at multiples of 128 elements.
        rows = max(1, _CPU_PIECE // max(1, p.shape[1]) // CODE_BLOCK) * CODE_BLOCK
        for i in range(0, p.shape[0], rows):
            p_, g_, m_ = p[i : i + rows], g[i : i + rows], None if m is None else m[i : i + rows]
            start = i * p.shape[1]
            first = scale_count(start)
            bits = None if key is None else random_bits(key, start, p_.numel()).view(p_.shape)
            codes_ = None if codes is None else codes[first : first + scale_count(p_.numel())]
            yield p_, g_, m_, s[i : i + rows] if s.shape[0] > 1 else s, codes_, bits


def _within_memory(many: Sequence[Blocks]) -> Iterator[list[Blocks]]:
    """Batches of blocks on one device with the same dtype, of at most ``_FOREACH_BYTES`` each."""
    batches: dict[tuple[object, ...], list[Blocks]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for b in many:
        key = (b.params[0].device, b.params[0].dtype, b.momentum is None)
        size = 8 * b.params[0].numel() * len(b.params)
        if key in batches and sizes[key] + size > _FOREACH_BYTES:
            yield batches.pop(key)
            sizes[key] = 0
        batches.setdefault(key, []).append(b)
        sizes[key] = sizes.get(key, 0) + size
    yield from batches.values()


def _store(target: Tensor, values: Tensor, bits: Tensor | None) -> None:
    """Round wide values to nearest and store them. With ``bits``, a bfloat16 target is rounded stochastically."""
    if bits is not None and target.dtype == torch.bfloat16:
        values = stochastic_bfloat16(values.float(), bits)
    target.copy_(values)
