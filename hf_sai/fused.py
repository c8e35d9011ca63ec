"""The fused path: prepares the input of the Triton kernels and launches them without waiting for the device.

One launch updates all blocks with the same combination of dtypes. Their addresses are in a table on the device. The
table is copied again only when it has changed. Nothing is copied back.
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

# The number of elements that one program updates, the number that it holds in registers at once, and its warps.
TILE = 8192
PIECE = 1024
WARPS = 4
_COLUMNS = 11  # the number of columns of the table
_KEPT_TABLES = 8

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def update_fused(many: Sequence[Blocks], hyper: Hyper) -> None:
    """Update contiguous blocks with one launch for each combination of dtypes, without host synchronisation.

    Under CUDA graph capture, an ``lr`` that changes later must be a tensor on the device.
    """
    FusedBlocks(many).update([g for b in many for g in b.grads], hyper)


class FusedBlocks:
    """Blocks whose addresses are looked up once. Later steps look up only the addresses of the gradients.

    Args:
        many: blocks that the fused path can update.
    """

    def __init__(self, many: Sequence[Blocks]) -> None:
        self._params = [p for b in many for p in b.params]
        self._grad_dtypes = [g.dtype for b in many for g in b.grads]
        self._addresses = [p.data_ptr() for p in self._params]
        self.counters = [b.counter for b in many if b.counter is not None]
        rows = [row for b in many for row in _rows(b)]
        owners = [b for b in many for _ in b.params]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (p, g_dtype, b) in enumerate(zip(self._params, self._grad_dtypes, owners, strict=True)):
            m_dtype = None if b.momentum is None else b.momentum.dtype
            groups.setdefault((p.device, p.dtype, g_dtype, m_dtype, b.column_factor is not None), []).append(i)
        self._launches = [(*key, members, [rows[i] for i in members]) for key, members in groups.items()]
        self._tables: dict[tuple[int, ...], tuple[Tensor, bool]] = {}

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """Whether the parameters have the same addresses, and the gradients are contiguous and have the same dtypes."""
        return (
            [p.data_ptr() for p in self._params] == self._addresses
            and [g.dtype for g in grads] == self._grad_dtypes
            and all(g.is_contiguous() for g in grads)
        )

    def update(self, grads: Sequence[Tensor], hyper: Hyper) -> None:
        """Update the blocks. The gradients are in the order of the parameters."""
        for device, p_dtype, g_dtype, m_dtype, has_columns, members, rows in self._launches:
            on_device = isinstance(hyper.lr, Tensor) and hyper.lr.device == device
            lr = 0.0 if on_device else float(hyper.lr)
            with _on(device):
                layout = _layout(tuple(row[5] for row in rows), TILE, device)
                table, aligned = self._table(device, rows, [grads[i].data_ptr() for i in members])
                update_kernel[(layout.programs,)](
                    table,
                    layout.tiles,
                    hyper.lr if on_device else table,  # the table is a placeholder if lr is a number
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
                    COLUMNS=has_columns,
                    LIMITED=hyper.limit is not None,
                    LR_TENSOR=on_device,
                    ALIGNED=aligned,
                    TILE=TILE,
                    PIECE=PIECE,
                    num_warps=WARPS,
                )

    def _table(self, device: torch.device, rows: Sequence[Any], addresses: list[int]) -> tuple[Tensor, bool]:
        """The table of a launch. It is rebuilt if the addresses of the gradients have changed."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        key = tuple(addresses)
        if key in self._tables and not capturing:
            return self._tables[key]
        values = tuple(x for row, g in zip(rows, addresses, strict=True) for x in (row[0], g, *row[1:]))
        table = _table(values, device)
        if len(self._tables) < _KEPT_TABLES:
            self._tables[key] = table
        return table


def _rows(b: Blocks) -> Iterator[tuple[int, ...]]:
    """The table rows of these blocks, without the address of the gradient; see ``update_kernel``."""
    momenta = [None] * len(b.params) if b.momentum is None else b.momentum.unbind()
    factors = [None] * len(b.params) if b.column_factor is None else b.column_factor.unbind()
    for p, m, s, factor in zip(b.params, momenta, b.scale.unbind(), factors, strict=True):
        yield (
            p.data_ptr(),
            0 if m is None else m.data_ptr(),
            0 if b.momentum_scale is None else b.momentum_scale.data_ptr(),
            s.data_ptr(),
            0 if b.counter is None else b.counter.data_ptr(),
            p.numel(),
            b.seed,
            b.columns,
            _kind(b, p, s),
            0 if factor is None else factor.data_ptr(),
        )


def _kind(b: Blocks, p: Tensor, s: Tensor) -> int:
    """The kind of channel for the kernel: the whole block, a row, a column, or a column of one matrix in a stack."""
    if s.numel() == 1 and b.column_factor is None:
        return -1
    if not b.rows:
        return 0
    return b.rows if p.numel() > b.rows * b.columns else -2


def fits_fused(b: Blocks) -> bool:
    """Whether the fused path can update these blocks: they must be contiguous, with dtypes that fit in float32."""
    m = b.momentum
    if m is not None and not (m.dtype in _TRITON_DTYPES and m.is_contiguous()):
        return False
    return all(
        p.dtype in FUSED_DTYPES and g.dtype in FUSED_DTYPES and p.is_contiguous() and g.is_contiguous()
        for p, g in zip(b.params, b.grads, strict=True)
    )


def gradient_moments(grads: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The sum of each gradient and its sum of squares about its mean.

    This takes one pass, and one host synchronisation per device and dtype.

    Args:
        grads: dense float32, bfloat16 or float16 tensors with at least one element each.
    """
    results: dict[int, tuple[float, float]] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, g in enumerate(grads):
        groups.setdefault((g.device, g.dtype), []).append(i)
    for (device, dtype), members in groups.items():
        rows = [x for i in members for x in (0, grads[i].data_ptr(), 0, 0, 0, 0, grads[i].numel(), 0, 0, 0, 0)]
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
    """The assignment of tiles to programs, for blocks of given sizes."""

    tiles: Tensor  # (programs, 2), int32
    first_tiles: Tensor  # (blocks + 1,), int32
    programs: int


@cache  # never dropped, because a CUDA graph may read it; there is one for each list of block sizes
def _layout(numels: tuple[int, ...], tile: int, device: torch.device) -> _Layout:
    counts = torch.tensor([triton.cdiv(n, tile) for n in numels])
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block = torch.repeat_interleave(torch.arange(len(numels)), counts)
    tiles = torch.stack([block, torch.arange(len(block)) - first[block]], dim=1)
    return _Layout(tiles.int().to(device), first.int().to(device), len(block))


def _table(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    """Copy ``values`` to the device without waiting. Also return whether all addresses allow loads of 16 bytes.

    Memory that a CUDA graph reads must stay valid as long as the graph may be replayed. This time is unknown, so tables
    made under capture are kept forever. The graph includes their copy from pinned memory. Earlier steps reserve the
    pinned memory, because it cannot always be allocated under capture.
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
    """A table, cached by its content, because the same addresses recur. Each stream has its own, to keep the order."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True), _aligned(values)


_spare: dict[int, list[Tensor]] = {}
_kept_for_graphs: list[Any] = []


def _aligned(rows: Sequence[int]) -> bool:
    return not any(address % 16 for column in range(4) for address in rows[column::_COLUMNS])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current, because Triton launches on the current device and not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
