"""The Triton kernels of :mod:`hf_sai.fused`: one updates a list of blocks, two measure a list of gradients.

For each element, in float32 registers::

    u = clamp(s * g, -limit, limit)            (s: the scale of the element's channel; g = -g first if maximize)
    m = m + weight * (u - m)
    p = (1 - lr * weight_decay) * p - lr * m

p, g and m are read once, and p and m are written once. This moves 20 bytes per float32 parameter, or 8 bytes with
bfloat16 parameters and int8 momentum. Names of kernel constants are in capitals.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os

import triton
import triton.language as tl

from hf_sai.momentum import CODE_BLOCK, LEVELS, SMALLEST
from hf_sai.rounding import GOLDEN, MULTIPLIERS

# The number of columns of the table.
_COLUMNS = tl.constexpr(11)

_CODE_BLOCK = tl.constexpr(CODE_BLOCK)
_LEVELS = tl.constexpr(LEVELS)
_SMALLEST = tl.constexpr(SMALLEST)
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 15)


@triton.jit
def _nearest(x, dtype: tl.constexpr):
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(dtype)
    return x.to(dtype)


@triton.jit
def _stochastic_bfloat16(x, bits):
    rounded = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def _update_piece(
    p_ptr,
    g_ptr,
    m_ptr,
    code_scale_ptr,
    scale_ptr,
    column_factor_ptr,
    first,
    numel,
    columns,
    kind,
    first_row,
    column,
    key,
    decay,
    lr,
    weight,
    limit,
    HAS_MOMENTUM: tl.constexpr,
    INT8: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIMITED: tl.constexpr,
    MASKED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Update the elements ``first`` to ``first + PIECE`` of a block. The pointers already point to ``first``."""
    if INT8:  # the elements of a row share a scale
        rows = tl.arange(0, PIECE // _CODE_BLOCK)
        offsets = rows[:, None] * _CODE_BLOCK + tl.arange(0, _CODE_BLOCK)[None, :]
    else:
        offsets = tl.arange(0, PIECE)
    # A comparison with a size that is only known on the device prevents wide loads, so whole pieces have no mask.
    left = numel - first
    mask = (offsets < left) if MASKED else None
    other: tl.constexpr = 0 if MASKED else None

    p = tl.load(p_ptr + offsets, mask=mask, other=other).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=other).to(tl.float32)
    if kind == -1:  # one scale for the block
        g = g * tl.load(scale_ptr)
    else:
        # Only the index of the tile's first element needs 64 bits, because the others are less than a tile away.
        rows_before = column // columns  # rows between the first element of the tile and that of the piece
        at = column - rows_before * columns + offsets
        if columns >= PIECE:  # a piece spans at most two rows
            wraps = at >= columns
            at_column = tl.where(wraps, at - columns, at)
            row = rows_before + wraps.to(tl.int32)
        else:
            row = rows_before + at // columns
            at_column = at % columns
        if kind == 0:  # a row is a channel
            channel = first_row + row
        elif kind == -2:  # a column is a channel
            channel = at_column.to(tl.int64)
        else:  # a channel is a column of one of several matrices with `kind` rows each
            row_of_stack = (first_row % kind).to(tl.int32) + row
            channel = (first_row // kind + row_of_stack // kind) * columns + at_column
        g = g * tl.load(scale_ptr + channel, mask=mask, other=other)
        if COLUMNS:
            g = g * tl.load(column_factor_ptr + at_column, mask=mask, other=other)
    if LIMITED:  # NaN stays NaN
        g = tl.where(g > limit, limit, g)
        g = tl.where(g < -limit, -limit, g)
    if MAXIMIZE:
        g = -g
    if INT8 or STOCHASTIC:
        bits = _hash(((first.to(tl.uint32) + offsets.to(tl.uint32)) * _GOLDEN) ^ key)
    if HAS_MOMENTUM:
        m = tl.load(m_ptr + offsets, mask=mask, other=other).to(tl.float32)
        if INT8:
            row_mask = (rows * _CODE_BLOCK < left) if MASKED else None
            m = m * tl.load(code_scale_ptr + rows, mask=row_mask, other=other)[:, None]
        m = m + weight * (g - m)
        if INT8:
            largest = tl.max(tl.abs(m), axis=1)
            levels_of_row = tl.full((PIECE // _CODE_BLOCK,), _LEVELS, tl.float32)
            tl.store(code_scale_ptr + rows, tl.div_rn(largest, levels_of_row), mask=row_mask)
            usable = largest > _SMALLEST
            inverse = tl.where(usable, tl.div_rn(levels_of_row, tl.where(usable, largest, 1.0)), 0.0)
            noise = (bits >> 16).to(tl.float32) * 0.0000152587890625  # 2**-16
            levels = tl.floor(m * inverse[:, None] + noise)
            levels = tl.minimum(tl.maximum(levels, -_LEVELS), _LEVELS)
            tl.store(m_ptr + offsets, levels.to(tl.int8), mask=mask)
        elif STOCHASTIC and m_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(m_ptr + offsets, _stochastic_bfloat16(m, bits >> 16), mask=mask)
        else:
            tl.store(m_ptr + offsets, _nearest(m, m_ptr.dtype.element_ty), mask=mask)
    else:
        m = g
    p = p * decay - lr * m
    if STOCHASTIC and p_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(p_ptr + offsets, _stochastic_bfloat16(p, bits), mask=mask)
    else:
        tl.store(p_ptr + offsets, _nearest(p, p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pointer(row_ptr, column: tl.constexpr, dtype: tl.constexpr, offset, ALIGNED: tl.constexpr):
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(dtype)) + offset
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def update_kernel(
    table_ptr,  # (blocks, 11): addresses of p, g, m, int8 scales of m, scale and counter; number of elements; seed;
    # length of a row; kind of channel; address of the column factors
    tiles_ptr,  # (programs, 2): the block of each program, and the number of its tile
    lr_ptr,
    lr,
    decay,
    weight_decay,
    weight,
    limit,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    INT8: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIMITED: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program) * _COLUMNS
    begin = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * TILE
    numel = tl.load(row_ptr + 6)
    p_ptr = _pointer(row_ptr, 0, P_DTYPE, begin, ALIGNED)
    g_ptr = _pointer(row_ptr, 1, G_DTYPE, begin, ALIGNED)
    m_ptr = p_ptr
    code_scale_ptr = p_ptr
    key = 0
    if HAS_MOMENTUM:
        m_ptr = _pointer(row_ptr, 2, M_DTYPE, begin, ALIGNED)
        if INT8:
            code_scale_ptr = _pointer(row_ptr, 3, tl.float32, begin // _CODE_BLOCK, ALIGNED)
    scale_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))
    # The column count of a block with one scale may exceed 32 bits, but it is not used then.
    column_factor_ptr = tl.load(row_ptr + 10).to(tl.pointer_type(tl.float32))
    columns = tl.load(row_ptr + 8)
    kind = tl.load(row_ptr + 9).to(tl.int32)
    first_row = begin // columns
    column = (begin - first_row * columns).to(tl.int32)
    columns = columns.to(tl.int32)
    if INT8 or STOCHASTIC:
        counter = tl.load(tl.load(row_ptr + 5).to(tl.pointer_type(tl.int64))).to(tl.uint32)
        key = _hash(_hash(tl.load(row_ptr + 7).to(tl.uint32) + 1) + counter)
    if LR_TENSOR:
        lr = tl.load(lr_ptr).to(tl.float32)
        decay = 1 - lr * weight_decay
    if begin + TILE <= numel:
        for done in range(0, TILE, PIECE):
            _update_piece(
                p_ptr + done, g_ptr + done, m_ptr + done, code_scale_ptr + done // _CODE_BLOCK, scale_ptr,
                column_factor_ptr,
                begin + done, numel, columns, kind, first_row, column + done, key, decay, lr, weight, limit,
                HAS_MOMENTUM, INT8, STOCHASTIC, MAXIMIZE, COLUMNS, LIMITED, False, PIECE,
            )  # fmt: skip
    else:
        for done in range(0, tl.minimum(numel - begin, TILE).to(tl.int32), PIECE):
            _update_piece(
                p_ptr + done, g_ptr + done, m_ptr + done, code_scale_ptr + done // _CODE_BLOCK, scale_ptr,
                column_factor_ptr,
                begin + done, numel, columns, kind, first_row, column + done, key, decay, lr, weight, limit,
                HAS_MOMENTUM, INT8, STOCHASTIC, MAXIMIZE, COLUMNS, LIMITED, True, PIECE,
            )  # fmt: skip


@triton.jit
def moments_kernel(
    table_ptr,  # as above: column 1 is the address of the gradient, column 6 its number of elements
    tiles_ptr,
    sums_ptr,  # (programs,): written
    centred_ptr,  # (programs,): written
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute each tile's sum and its sum of squares about its own mean, in one pass and without cancellation."""
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program) * _COLUMNS
    begin = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * TILE
    left = tl.load(row_ptr + 6) - begin
    g_ptr = _pointer(row_ptr, 1, G_DTYPE, begin, ALIGNED)
    offsets = tl.arange(0, TILE)
    if left >= TILE:
        g = tl.load(g_ptr + offsets).to(tl.float32)
        total = tl.sum(g)
        deviation = g - total / TILE
    else:
        mask = offsets < left
        g = tl.load(g_ptr + offsets, mask=mask, other=0).to(tl.float32)
        total = tl.sum(g)
        deviation = tl.where(mask, g - total / left.to(tl.float32), 0.0)
    tl.store(sums_ptr + program, total)
    tl.store(centred_ptr + program, tl.sum(deviation * deviation))


@triton.jit
def combine_kernel(
    table_ptr,
    first_tile_ptr,  # (blocks + 1,)
    sums_ptr,
    centred_ptr,
    moments_ptr,  # (blocks, 2): written
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Combine the tiles of each block by Chan's formula, in float64 and in a fixed order. One program per block."""
    block = tl.program_id(0)
    numel = tl.load(table_ptr + block * _COLUMNS + 6)
    first = tl.load(first_tile_ptr + block)
    last = tl.load(first_tile_ptr + block + 1)
    columns = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for tile in range(first, last, WIDTH):
        total += tl.load(sums_ptr + tile + columns, mask=tile + columns < last, other=0.0).to(tl.float64)
    block_total = tl.sum(total)
    mean = block_total / numel.to(tl.float64)
    centred = tl.zeros((WIDTH,), tl.float64)
    for tile in range(first, last, WIDTH):
        mask = tile + columns < last
        sums = tl.load(sums_ptr + tile + columns, mask=mask, other=0.0).to(tl.float64)
        before = (tile + columns - first).to(tl.int64) * TILE
        count = tl.minimum(numel - before, TILE).to(tl.float64)
        apart = sums / tl.where(mask, count, 1.0) - mean
        own = tl.load(centred_ptr + tile + columns, mask=mask, other=0.0).to(tl.float64)
        centred += tl.where(mask, own + count * apart * apart, 0.0)
    tl.store(moments_ptr + 2 * block, block_total)
    tl.store(moments_ptr + 2 * block + 1, tl.sum(centred))
