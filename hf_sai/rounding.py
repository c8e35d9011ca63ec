"""Random bits without a generator, and stochastic rounding to bfloat16 with them.

The bits of element ``i`` of a block in step ``t`` are a hash of (seed of the block, t, i): the same in every path, on
every device and after every resume, and no state is kept but t. The hash is ``lowbias32`` of Chris Wellons' hash
prospector with its later constants (bias 0.107); :mod:`hf_sai.triton_kernels` computes the same one on the device.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
# 2^32 divided by the golden ratio, odd: neighbouring indices land far apart before they are hashed.
GOLDEN = 0x9E3779B9


def rounding_key(counter: Tensor, seed: int) -> Tensor:
    """What distinguishes one block and step from another, a 0-dim int32 tensor on the counter's device.

    Args:
        counter: how often the block has been updated, a 0-dim integer tensor.
        seed: the block's own number.
    """
    # One is added because the hash of zero is zero.
    return _hash(_hash(torch.full_like(counter, _signed(seed + 1), dtype=torch.int32)) + counter.to(torch.int32))


def random_bits(key: Tensor, start: int, numel: int) -> Tensor:
    """32 random bits for each of ``numel`` elements of a block from ``start`` on, as int32 on the key's device."""
    index = torch.arange(numel, dtype=torch.int32, device=key.device)
    return _hash(index.add_(_signed(start)).mul_(_signed(GOLDEN)).bitwise_xor_(key))


def stochastic_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """``values`` rounded to one of the two nearest bfloat16 numbers, to the nearer one more often: without bias.

    Args:
        values: float32, any shape.
        bits: int32 of the same shape; the lower 16 bits are used.
    """
    rounded = values.view(torch.int32).add(bits & 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    # The carry could turn a NaN into a number.
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def _hash(x: Tensor) -> Tensor:
    """``lowbias32`` in place, on int32 that stands for uint32: a shift to the right must not copy the sign."""
    first, second = map(_signed, MULTIPLIERS)
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(first)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(second)
    return x.bitwise_xor_((x >> 15) & 0x1FFFF)


def _signed(value: int) -> int:
    """The int32 with the lower 32 bits of ``value``."""
    return (value + 2**31) % 2**32 - 2**31
