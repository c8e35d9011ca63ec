"""Random bits without a generator, and stochastic rounding to bfloat16.

The bits of element ``i`` of a block in step ``t`` are a hash of (seed of the block, t, i). They are the same in every
path, on every device and after every resume. The only state is t. The hash is ``lowbias32`` from Chris Wellons' hash
prospector with its later constants (bias 0.107). :mod:`hf_sai.triton_kernels` computes the same hash on the device.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
# 2^32 divided by the golden ratio, an odd number. It moves neighbouring indices far apart before they are hashed.
GOLDEN = 0x9E3779B9


def rounding_key(counter: Tensor, seed: int) -> Tensor:
    """A key for this block and step, a 0-dim int32 tensor on the counter's device.

    Args:
        counter: the number of updates of the block, a 0-dim integer tensor.
        seed: the seed of the block.
    """
    # One is added because the hash of zero is zero.
    return _hash(_hash(torch.full_like(counter, _signed(seed + 1), dtype=torch.int32)) + counter.to(torch.int32))


def random_bits(key: Tensor, start: int, numel: int) -> Tensor:
    """32 random bits for each of the ``numel`` elements of a block that begin at ``start``, int32, on key's device."""
    index = torch.arange(numel, dtype=torch.int32, device=key.device)
    return _hash(index.add_(_signed(start)).mul_(_signed(GOLDEN)).bitwise_xor_(key))


def stochastic_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Round ``values`` to one of the two nearest bfloat16 numbers, without bias: the nearer one is more likely.

    Args:
        values: float32, any shape.
        bits: int32 of the same shape. The lower 16 bits are used.
    """
    rounded = values.view(torch.int32).add(bits & 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    # Without this, the carry could turn a NaN into a number.
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def _hash(x: Tensor) -> Tensor:
    """``lowbias32`` in place, on int32 values used as uint32. So a right shift must not copy the sign."""
    first, second = map(_signed, MULTIPLIERS)
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(first)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(second)
    return x.bitwise_xor_((x >> 15) & 0x1FFFF)


def _signed(value: int) -> int:
    """The int32 with the lower 32 bits of ``value``."""
    return (value + 2**31) % 2**32 - 2**31
