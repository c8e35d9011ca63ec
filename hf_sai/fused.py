"""The fused path: prepares what the Triton kernels need, and launches them without waiting for the device.

A launch covers all blocks of one combination of dtypes. Where their tensors lie is in a table on the device, which is
sent anew only when it has changed. Nothing is read back.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sai.kernels import Block, Scalar
from hf_sai.triton_kernels import combine_kernel, moments_kernel, update_kernel

# Elements that one program updates, those it holds in registers at once, and its warps.
TILE = 8192
PIECE = 1024
WARPS = 4

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def update_fused(
    blocks: Sequence[Block],
    *,
    lr: Scalar,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update blocks whose tensors lie in memory alike, without holes: one launch for each combination of dtypes.

    No host synchronisation. Under CUDA graph capture an ``lr`` that is to change must be a tensor on the device.
    """
    lr_tensor = lr if isinstance(lr, Tensor) and lr.device == blocks[0].param.device else None
    if lr_tensor is None:
        lr = float(lr)
    groups: dict[tuple[Any, ...], list[Block]] = {}
    for b in blocks:
        m = b.momentum_buffer
        groups.setdefault((b.param.device, b.param.dtype, b.grad.dtype, None if m is None else m.dtype), []).append(b)
    for (device, p_dtype, g_dtype, m_dtype), members in groups.items():
        rows = [
            value
            for b in members
            for value in (
                b.param.data_ptr(),
                b.grad.data_ptr(),
                0 if b.momentum_buffer is None else b.momentum_buffer.data_ptr(),
                0 if b.momentum_scale is None else b.momentum_scale.data_ptr(),
                b.scale.data_ptr(),
                0 if b.counter is None else b.counter.data_ptr(),
                b.param.numel(),
                b.seed,
            )
        ]
        with _on(device):
            layout = _layout(tuple(rows[6::8]), TILE, device)
            table, aligned = _table(tuple(rows), device)
            # The table stands where an optional pointer is not used.
            update_kernel[(layout.programs,)](
                table,
                layout.tiles,
                table if lr_tensor is None else lr_tensor.to(device),
                table if grad_scale is None else grad_scale.to(device),
                table if found_inf is None else found_inf.to(device),
                0.0 if lr_tensor is not None else lr,
                0.0 if lr_tensor is not None else 1 - lr * weight_decay,
                float(weight_decay),
                1.0 - momentum,
                P_DTYPE=_TRITON_DTYPES[p_dtype],
                G_DTYPE=_TRITON_DTYPES[g_dtype],
                M_DTYPE=_TRITON_DTYPES[m_dtype or p_dtype],
                HAS_MOMENTUM=m_dtype is not None,
                INT8=m_dtype == torch.int8,
                STOCHASTIC=stochastic_rounding and torch.bfloat16 in (p_dtype, m_dtype),
                MAXIMIZE=maximize,
                LR_TENSOR=lr_tensor is not None,
                GRAD_SCALE=grad_scale is not None,
                FOUND_INF=found_inf is not None,
                ALIGNED=aligned,
                TILE=TILE,
                PIECE=PIECE,
                num_warps=WARPS,
            )


def gradient_moments(grads: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The sum of each gradient and its sum of squares about its mean, in one pass, one host synchronisation a dtype.

    Args:
        grads: float32, bfloat16 or float16 tensors, each dense, with at least one element.
    """
    results: dict[int, tuple[float, float]] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, g in enumerate(grads):
        groups.setdefault((g.device, g.dtype), []).append(i)
    for (device, dtype), members in groups.items():
        rows = [x for i in members for x in (0, grads[i].data_ptr(), 0, 0, 0, 0, grads[i].numel(), 0)]
        with _on(device):
            layout = _layout(tuple(rows[6::8]), TILE, device)
            table, aligned = _table(tuple(rows), device)
            sums, centred = torch.empty(2, layout.programs, device=device).unbind()
            moments = torch.empty(len(members), 2, dtype=torch.float64, device=device)
            constants = {"G_DTYPE": _TRITON_DTYPES[dtype], "ALIGNED": aligned, "TILE": TILE}
            moments_kernel[(layout.programs,)](table, layout.tiles, sums, centred, num_warps=WARPS, **constants)
            combine_kernel[(len(members),)](
                table, layout.first_tiles, sums, centred, moments, TILE=TILE, WIDTH=256, num_warps=1
            )
        for i, (total, squares) in zip(members, moments.tolist(), strict=True):
            results[i] = (total, squares)
    return [results[i] for i in range(len(grads))]


class _Layout(NamedTuple):
    """Which program does what, for blocks of given sizes."""

    tiles: Tensor  # (programs, 2), int32
    first_tiles: Tensor  # (blocks + 1,), int32
    programs: int


@cache  # never dropped: a CUDA graph may read it, and there are as many as models and their blocks' sizes
def _layout(numels: tuple[int, ...], tile: int, device: torch.device) -> _Layout:
    counts = torch.tensor([triton.cdiv(n, tile) for n in numels])
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block = torch.repeat_interleave(torch.arange(len(numels)), counts)
    tiles = torch.stack([block, torch.arange(len(block)) - first[block]], dim=1)
    return _Layout(tiles.int().to(device), first.int().to(device), len(block))


def _table(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    """``values`` on the device, without waiting for it, and whether all addresses in them allow loads of 16 bytes.

    What a CUDA graph reads must stay where it is for as long as the graph may be replayed, which nobody can know:
    tables made under capture are kept. Their copy is part of the graph, from pinned memory, which was set aside by
    the steps before, since memory cannot always be pinned under capture.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device), _aligned(values)
    if not torch.cuda.is_current_stream_capturing():
        if not _spare.get(len(values)):
            _spare[len(values)] = [torch.empty(len(values), dtype=torch.int64, pin_memory=True)]
        return _cached_table(values, device, torch.cuda.current_stream(device).cuda_stream)
    spare = _spare.get(len(values))
    pinned = spare.pop() if spare else torch.empty(len(values), dtype=torch.int64, pin_memory=True)
    pinned.copy_(torch.tensor(values, dtype=torch.int64))
    table = pinned.to(device, non_blocking=True)
    _kept_for_graphs.append((pinned, table))
    return table, _aligned(values)


@lru_cache(maxsize=256)
def _cached_table(values: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, bool]:
    """A table by its content: optimizers see the same addresses again and again. One a stream, for its order."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True), _aligned(values)


_spare: dict[int, list[Tensor]] = {}
_kept_for_graphs: list[Any] = []


def _aligned(rows: Sequence[int]) -> bool:
    return not any(address % 16 for column in range(4) for address in rows[column::8])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
