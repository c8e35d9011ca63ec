"""Defines channels: a channel is the part of a block that has one scale under ``scaling="adamw"``.

The rows of a matrix are channels, and so are its columns. The scale of an element is made from both. A convolution is a
matrix (outputs, inputs x kernel). A tensor of three dimensions whose last two are at least 16 is a stack of matrices
(the experts of a mixture). In a convolution or a stack, only the indices of the longer matrix dimension are channels. A
vector or a scalar is one channel.

Scales have the shape of the block with the dimensions of a channel reduced to 1. So they broadcast against the block
and are split over processes like the block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST_STACKED = 16


class Channels(NamedTuple):
    """The channels of a block.

    Attributes:
        shape: the shape of the scales, which broadcasts against the block.
        dims: the dimensions of the block that a channel extends over.
        size: the number of elements in a channel.
    """

    shape: torch.Size
    dims: tuple[int, ...]
    size: int


def channels(shape: torch.Size, scaling: str = "adamw") -> Channels:
    """The channels of a block; for a matrix, its rows. Under the paper's scalings the whole block is one channel."""
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
    """The columns of a matrix, or None for any other block."""
    if scaling != "adamw" or len(shape) != 2:
        return None
    return Channels(torch.Size([1, shape[1]]), (0,), shape[0])


def matrix_layout(shape: torch.Size, dims: tuple[int, ...]) -> tuple[int, int]:
    """View a contiguous tensor of ``shape`` as matrices with one scale for each channel.

    Args:
        shape: the shape of a block, or of the part of it on this process.
        dims: the dimensions that a channel extends over.

    Returns:
        ``columns``, the length of a row of each matrix, and ``rows``. If a channel is a column, ``rows`` is the number
        of rows of each matrix. If a channel is a row, ``rows`` is 0.
    """
    if dims == tuple(range(len(shape) - len(dims), len(shape))):
        return max(1, shape[len(shape) - len(dims) :].numel()), 0
    return max(1, shape[dims[0] + 1 :].numel()), shape[dims[0]]


def channel_index(start: int, length: int, shape: torch.Size, dims: tuple[int, ...], device: torch.device) -> Tensor:
    """The channel of each of the ``length`` elements of a flattened block that begin at ``start``, int64."""
    columns, rows = matrix_layout(shape, dims)
    offsets = torch.arange(start, start + length, device=device)
    row = offsets.div(columns, rounding_mode="floor")
    if not rows:
        return row
    return row.div(rows, rounding_mode="floor") * columns + offsets % columns
