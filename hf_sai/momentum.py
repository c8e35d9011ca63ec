"""8-bit momentum: linear codes with one float32 scale for every 128 elements, rounded stochastically.

Why this code. The update of SGD is linear in the momentum, so what matters is that the stored momentum has no bias and
little noise in absolute terms: evenly spaced levels have the least noise for their number, and stochastic rounding has
no bias, so that gradients below half a level survive on average (rounding to nearest would lose them for ever).
Logarithmic codes, as of 8-bit Adam, are for quantities that one divides by. 128 elements share a scale because that is
what one warp of a GPU holds in 4-byte loads, and it keeps an outlier's neighbours few. A zero stays exactly zero.
Cost: 1 + 4/128 bytes a parameter.
"""

import torch
from torch import Tensor

# Consecutive elements, in row-major order, that share one scale.
CODE_BLOCK = 128
LEVELS = 127
# Below it the inverse of a scale overflows: such momentum is stored as zero.
SMALLEST = 1e-36


def scale_count(numel: int) -> int:
    """How many scales a block of ``numel`` elements has."""
    return -(-numel // CODE_BLOCK)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The momentum that ``codes`` (int8, one dimension) and ``scales`` (one for 128 codes) stand for, in float32."""
    rows = _rows(codes.to(torch.float32))
    return rows.mul_(scales[:, None]).view(-1)[: codes.numel()]


def encode(values: Tensor, codes: Tensor, scales: Tensor, bits: Tensor) -> None:
    """Store ``values`` in ``codes`` and ``scales``, rounding each to a neighbouring level without bias.

    Args:
        values: float32, one dimension.
        codes: int8, as many; written.
        scales: float32, ``scale_count`` of them; written.
        bits: int32, as many as values; the upper 16 bits are used.
    """
    rows = _rows(values)
    largest = rows.abs().amax(dim=1)
    torch.div(largest, LEVELS, out=scales)
    inverse = torch.where(largest > SMALLEST, LEVELS / largest, 0.0)
    noise = ((bits >> 16) & 0xFFFF).to(torch.float32).mul_(2.0**-16)
    levels = (rows * inverse[:, None]).view(-1)[: values.numel()].add_(noise).floor_()
    codes.copy_(levels.clamp_(-LEVELS, LEVELS))


def _rows(values: Tensor) -> Tensor:
    """``values`` as rows of 128, the last one filled with zeros."""
    missing = -values.numel() % CODE_BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, CODE_BLOCK)
