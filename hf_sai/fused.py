"""The fused path: prepares what the Triton kernels need, and launches them without waiting for the device.

A launch covers all blocks of one combination of dtypes. Their addresses are in a table on the device, which is copied
again only when it has changed. Nothing is copied back.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sai.kernels import Blocks
from hf_sai.options import Hyper
from hf_sai.triton_kernels import combine_kernel, moments_kernel, update_kernel

# Elements that one program updates, those it holds in registers at once, and its warps.
TILE = 8192
PIECE = 1024
WARPS = 4
_COLUMNS = 10  # of the table

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def update_fused(many: Sequence[Blocks], hyper: Hyper) -> None:
    """Update contiguous blocks: one launch for each combination of dtypes, without host synchronisation.

    Under CUDA graph capture an ``lr`` that is to change must be a tensor on the device.
    """
    lr_tensor = hyper.lr if isinstance(hyper.lr, Tensor) and hyper.lr.device == many[0].params[0].device else None
    lr = float(hyper.lr) if lr_tensor is None else 0.0
    groups: dict[tuple[Any, ...], list[Blocks]] = {}
    for b in many:
        dtypes = (b.params[0].dtype, b.grads[0].dtype, None if b.momentum is None else b.momentum.dtype)
        groups.setdefault((b.params[0].device, *dtypes), []).append(b)
    for (device, p_dtype, g_dtype, m_dtype), members in groups.items():
        rows = [value for b in members for row in _rows(b) for value in row]
        with _on(device):
            layout = _layout(tuple(rows[6::_COLUMNS]), TILE, device)
            table, aligned = _table(tuple(rows), device)
            update_kernel[(layout.programs,)](
                table,
                layout.tiles,
                table if lr_tensor is None else lr_tensor.to(device),  # the table stands where lr is a number
                lr,
                1 - lr * hyper.weight_decay,
                float(hyper.weight_decay),
                float(hyper.weight),
                0.0 if hyper.limit is None else float(hyper.limit),
                P_DTYPE=_TRITON_DTYPES[p_dtype],
                G_DTYPE=_TRITON_DTYPES[g_dtype],
                M_DTYPE=_TRITON_DTYPES[m_dtype or p_dtype],
                HAS_MOMENTUM=m_dtype is not None,
                INT8=m_dtype == torch.int8,
                STOCHASTIC=hyper.stochastic_rounding and torch.bfloat16 in (p_dtype, m_dtype),
                MAXIMIZE=hyper.maximize,
                LIMITED=hyper.limit is not None,
                LR_TENSOR=lr_tensor is not None,
                ALIGNED=aligned,
                TILE=TILE,
                PIECE=PIECE,
                num_warps=WARPS,
            )


def _rows(b: Blocks) -> Iterator[tuple[int, ...]]:
    """The rows of the table for some blocks; see ``update_kernel``."""
    momenta = [None] * len(b.params) if b.momentum is None else b.momentum.unbind()
    for p, g, m, s in zip(b.params, b.grads, momenta, b.scale.unbind(), strict=True):
        one_scale = s.numel() == 1
        yield (
            p.data_ptr(),
            g.data_ptr(),
            0 if m is None else m.data_ptr(),
            0 if b.momentum_scale is None else b.momentum_scale.data_ptr(),
            s.data_ptr(),
            0 if b.counter is None else b.counter.data_ptr(),
            p.numel(),
            b.seed,
            1 if one_scale else b.columns,
            -1 if one_scale else b.rows,
        )


def fits_fused(b: Blocks) -> bool:
    """Whether the fused path can update these blocks: contiguous, and of dtypes that float32 holds."""
    m = b.momentum
    if m is not None and not (m.dtype in _TRITON_DTYPES and m.is_contiguous()):
        return False
    return all(
        p.dtype in FUSED_DTYPES and g.dtype in FUSED_DTYPES and p.is_contiguous() and g.is_contiguous()
        for p, g in zip(b.params, b.grads, strict=True)
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
        rows = [x for i in members for x in (0, grads[i].data_ptr(), 0, 0, 0, 0, grads[i].numel(), 0, 0, 0)]
        with _on(device):
            layout = _layout(tuple(rows[6::_COLUMNS]), TILE, device)
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
    return not any(address % 16 for column in range(4) for address in rows[column::_COLUMNS])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
