"""8-bit momentum: linear codes with one float32 scale for every 128 elements, rounded stochastically.

The update of SGD is linear in the momentum. So the stored momentum must have no bias and little absolute noise. For a
given number of levels, even spacing has the least noise. Stochastic rounding has no bias, so gradients below half a
level survive on average. Rounding to nearest would lose them. Logarithmic codes, as in 8-bit Adam, suit quantities that
are used as divisors. 128 elements share a scale because one warp of a GPU reads 128 bytes in 4-byte loads. A small
group also limits how many neighbours an outlier affects. A zero stays exactly zero. The momentum takes 1 + 4/128 bytes
per parameter.
"""

import torch
from torch import Tensor

# The number of consecutive elements, in row-major order, that share one scale.
CODE_BLOCK = 128
LEVELS = 127
# Below this value the inverse of a scale overflows, so the momentum is stored as zero.
SMALLEST = 1e-36


def scale_count(numel: int) -> int:
    """The number of scales of a block with ``numel`` elements."""
    return -(-numel // CODE_BLOCK)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 momentum for ``codes`` (int8, one dimension) and ``scales`` (one for every 128 codes)."""
    rows = _rows(codes.to(torch.float32))
    return rows.mul_(scales[:, None]).view(-1)[: codes.numel()]


def encode(values: Tensor, codes: Tensor, scales: Tensor, bits: Tensor) -> None:
    """Store ``values`` in ``codes`` and ``scales``, rounding each to a neighbouring level without bias.

    Args:
        values: float32, one dimension.
        codes: int8, the same length; written.
        scales: float32, of length ``scale_count``; written.
        bits: int32, the same length as ``values``. The upper 16 bits are used.
    """
    rows = _rows(values)
    largest = rows.abs().amax(dim=1)
    torch.div(largest, LEVELS, out=scales)
    inverse = torch.where(largest > SMALLEST, LEVELS / largest, 0.0)
    noise = ((bits >> 16) & 0xFFFF).to(torch.float32).mul_(2.0**-16)
    levels = (rows * inverse[:, None]).view(-1)[: values.numel()].add_(noise).floor_()
    codes.copy_(levels.clamp_(-LEVELS, LEVELS))


def _rows(values: Tensor) -> Tensor:
    """``values`` as rows of 128. The last row is padded with zeros."""
    missing = -values.numel() % CODE_BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, CODE_BLOCK)
