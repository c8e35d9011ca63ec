"""Blocks for the tests of the update's paths, and how near two paths must come."""

from typing import Any

import torch
from torch import Tensor

from hf_sai.kernels import Block
from hf_sai.momentum import LEVELS, scale_count

SIZES = (1, 2, 127, 128, 129, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)
HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "maximize": False}


def make_blocks(
    sizes: Any = SIZES,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    m_dtype: torch.dtype | None = torch.float32,
    stochastic_rounding: bool = False,
    device: str = "cpu",
) -> list[Block]:
    """One block a size, with a scale and a counter of its own."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for seed, size in enumerate(sizes):
        p, g, m = (torch.randn(size, generator=generator) for _ in range(3))
        scales = None
        if m_dtype == torch.int8:
            m = torch.randint(-LEVELS, LEVELS + 1, (size,), generator=generator)
            scales = (torch.rand(scale_count(size), generator=generator) / LEVELS).to(device)
        scale = torch.tensor(0.5 + seed, device=device)
        counter = torch.tensor(3 + seed, device=device) if stochastic_rounding or m_dtype == torch.int8 else None
        momentum = None if m_dtype is None else m.to(device, m_dtype)
        blocks.append(
            Block(p.to(device, p_dtype), g.to(device, g_dtype), momentum, scales, scale, scale.item(), counter, seed)
        )
    return blocks


def copied(blocks: list[Block]) -> list[Block]:
    return [Block(*(x.clone() if isinstance(x, Tensor) else x for x in b)) for b in blocks]


def assert_same(actual: list[Block], expected: list[Block], before: list[Block]) -> None:
    """Each path rounds to float32 at most four times more or less often than another, in its own order; float64 alike.

    In what is then rounded to fewer bits the two may fall on neighbouring numbers where one of those float32 numbers
    lies within that distance of a boundary: seldom (at most in 1 of 100 elements, or in one). But of two numbers with
    few bits, 0.9*m + 0.1*g lies exactly on one whenever 9*m + g is 5 more than a multiple of 10 units: in 1 of 10.
    """
    for a, e, b in zip(actual, expected, before, strict=True):
        # The terms that are added up, in units of which float32 rounds.
        step = HYPER["lr"] * float(b.host_scale)
        size = b.param.double().abs() + b.grad.double().abs() * step
        if b.momentum_buffer is not None:
            held = b.momentum_buffer.double().abs()
            if b.momentum_scale is not None:
                held = held * b.momentum_scale.max()
            size = size + step * held
            momentum_size = held + b.grad.double().abs()
            if a.momentum_scale is not None:
                torch.testing.assert_close(a.momentum_scale, e.momentum_scale, rtol=4 * 2.0**-23, atol=0.0)
                _assert_near(a.momentum_buffer, e.momentum_buffer, torch.ones_like(held))
            else:
                few_bits = torch.float32 not in (b.momentum_buffer.dtype, b.grad.dtype)
                _assert_near(a.momentum_buffer, e.momentum_buffer, momentum_size, one_in=10 if few_bits else 100)
        _assert_near(a.param, e.param, size)


def _assert_near(a: Tensor | None, e: Tensor | None, size: Tensor, one_in: int = 100) -> None:
    assert a is not None
    assert e is not None
    assert a.dtype == e.dtype
    difference = (a.double() - e.double()).abs()
    if a.dtype in (torch.float32, torch.float64):
        assert (difference <= 4 * torch.finfo(a.dtype).eps * size).all(), difference.max()
        return
    spacing = torch.ones_like(difference) if a.dtype == torch.int8 else torch.finfo(a.dtype).eps * e.double().abs()
    subnormal = 0.0 if a.dtype == torch.int8 else torch.finfo(a.dtype).smallest_normal
    # Where the terms cancel, what is left of them is what float32 has rounded.
    allowed = spacing + subnormal + (0.0 if a.dtype == torch.int8 else 4 * 2.0**-23 * size)
    assert (difference <= allowed).all(), (difference - allowed).max()
    assert (difference > 0).sum() <= max(1, difference.numel() // one_in), f"more than 1 of {one_in} elements differ"
