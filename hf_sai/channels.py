"""What a channel is: the part of a block that has one scale under ``scaling="adamw"``.

The rows of a matrix are channels, and so are its columns: the scale of an element is made from both. A convolution is
the matrix (outputs, inputs x kernel), a tensor of three dimensions whose last two are both at least 16 is a stack of
matrices (the experts of a mixture); in these the indices of the longer dimension of a matrix are channels. A vector or
a scalar is one channel.

Scales have the shape of the block with the dimensions of a channel reduced to 1, so that they broadcast against it and
are split over processes as it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST_STACKED = 16


class Channels(NamedTuple):
    """How a block of some shape falls into channels.

    Attributes:
        shape: of the scales; broadcasts against the block.
        dims: the dimensions of the block that a channel runs over.
        size: elements of one channel.
    """

    shape: torch.Size
    dims: tuple[int, ...]
    size: int


def channels(shape: torch.Size, scaling: str = "adamw") -> Channels:
    """The channels of a block, of a matrix its rows; under the paper's scalings the whole block is one."""
    dims = len(shape)
    if scaling != "adamw" or dims < 2:
        return Channels(torch.Size([1] * dims), tuple(range(dims)), shape.numel())
    stacked = dims == 3 and min(shape[1:]) >= _SMALLEST_STACKED
    first = 1 if stacked else 0
    rows, columns = shape[first], shape[first + 1 :].numel()
    reduced = tuple(range(first + 1, dims)) if dims == 2 or rows >= columns else (first,)
    scales = torch.Size([1 if d in reduced else n for d, n in enumerate(shape)])
    return Channels(scales, reduced, shape.numel() // max(1, scales.numel()))


def column_channels(shape: torch.Size, scaling: str = "adamw") -> Channels | None:
    """The columns of a matrix, None for any other block."""
    if scaling != "adamw" or len(shape) != 2:
        return None
    return Channels(torch.Size([1, shape[1]]), (0,), shape[0])


def matrix_layout(shape: torch.Size, dims: tuple[int, ...]) -> tuple[int, int]:
    """How a contiguous tensor of ``shape`` is read with one scale for each channel.

    Args:
        shape: of a block, or of the part of it that a process holds.
        dims: the dimensions that a channel runs over.

    Returns:
        ``columns``, the length of a row of each matrix, and ``rows``, the rows of each matrix where a channel is a
        column of it, 0 where it is a row.
    """
    if dims == tuple(range(len(shape) - len(dims), len(shape))):
        return max(1, shape[len(shape) - len(dims) :].numel()), 0
    return max(1, shape[dims[0] + 1 :].numel()), shape[dims[0]]


def channel_index(start: int, length: int, shape: torch.Size, dims: tuple[int, ...], device: torch.device) -> Tensor:
    """The channel of each of ``length`` elements of a flattened block from ``start`` on, int64."""
    columns, rows = matrix_layout(shape, dims)
    offsets = torch.arange(start, start + length, device=device)
    row = offsets.div(columns, rounding_mode="floor")
    if not rows:
        return row
    return row.div(rows, rounding_mode="floor") * columns + offsets % columns
