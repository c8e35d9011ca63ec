"""Stochastic rounding: fair and independent bits, no bias, and training that goes on where it stalls."""

import math

import pytest
import torch

from hf_sai import SGDSaI
from hf_sai.rounding import random_bits, rounding_key, stochastic_bfloat16


def bits_of(seed: int, step: int, numel: int) -> torch.Tensor:
    return random_bits(rounding_key(torch.tensor(step), seed), 0, numel)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-9, 1.0 + 2**-8, 3.14159, -0.7071, 1e-30, 1e-39])
def test_rounding_is_unbiased(value: float) -> None:
    n = 1 << 16
    x = torch.full((n,), value)
    rounded = stochastic_bfloat16(x, bits_of(1, 0, n)).double()
    below, above = rounded.min().item(), rounded.max().item()
    exact = x[0].double().item()
    assert min(below, above) <= exact <= max(below, above)
    # One unit of bfloat16 apart, and a mean within 5 standard errors (and the 2^-16 of a unit that 16 bits leave).
    unit = above - below
    spacing = max(2.0 ** (math.floor(math.log2(abs(exact))) - 7), 2.0**-133)
    assert unit in (0.0, spacing)
    assert abs(rounded.mean().item() - exact) <= unit * (0.5 * 5 / math.sqrt(n) + 2**-16)


def test_special_values_stay_what_they_are() -> None:
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000, 0, -(2**31)], dtype=torch.int32)
    x = patterns.view(torch.float32)
    for step in range(50):
        rounded = stochastic_bfloat16(x, bits_of(0, step, len(x)))
        assert rounded[:3].isnan().all()
        assert torch.equal(rounded[3:], x[3:].bfloat16())


def test_bits_are_fair_and_independent() -> None:
    """Over elements, steps and blocks: every bit is set half the time, and no two streams agree more than by chance."""
    n = 1 << 14
    streams = torch.stack([bits_of(seed, step, n) for seed in (0, 1, 2, 77) for step in (0, 1, 2, 1000)])
    tolerance = 5 * 0.5 / math.sqrt(n)
    ones = torch.stack([(streams >> b & 1).double() for b in range(32)])  # (bit, stream, element)
    assert ((ones.mean(-1) - 0.5).abs() <= tolerance).all()
    signs = (2 * ones - 1).flatten(0, 1)  # (bit and stream, element)
    agreement = signs @ signs.T / n
    agreement.fill_diagonal_(0)
    # 512 * 511 / 2 pairs: the largest of so many is expected near 5 standard errors.
    assert agreement.abs().max() <= 6 / math.sqrt(n)
    neighbours = (signs[:, 1:] * signs[:, :-1]).mean(-1)
    assert (neighbours.abs() <= 5 / math.sqrt(n)).all()


def test_bits_do_not_depend_on_how_a_block_is_cut() -> None:
    key = rounding_key(torch.tensor(9), 4)
    whole = random_bits(key, 0, 1000)
    assert torch.equal(whole, torch.cat([random_bits(key, 0, 384), random_bits(key, 384, 616)]))
    assert not torch.equal(random_bits(key, 2**32 - 8, 16)[:8], whole[:8])  # beyond 31 bits


def train(stochastic: bool, dtype: torch.dtype, steps: int = 2000) -> float:
    """Distance to the minimum of a quadratic after steps that are far below bfloat16's resolution near 1."""
    torch.manual_seed(0)
    target = torch.randn(512).abs() + 1
    p = torch.nn.Parameter(torch.ones(512, dtype=dtype))
    optimizer = SGDSaI([p], weight_decay=0.0, stochastic_rounding=stochastic, momentum_dtype="float32")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        p.grad = (p.detach().float() - target).to(dtype)
        optimizer.step()
    return (p.detach().float() - target).norm().item() / (1 - target).norm().item()


def test_plain_bfloat16_stalls_and_stochastic_rounding_does_not() -> None:
    exact, plain, stochastic = train(False, torch.float32), train(False, torch.bfloat16), train(True, torch.bfloat16)
    print(f"left of the distance: float32 {exact:.3f}, bfloat16 {plain:.3f}, stochastic {stochastic:.3f}")
    assert exact < 0.1
    assert plain > 0.5
    # bfloat16 near 2 has a resolution of 2^-7: what is left beside float32's own is of that order.
    assert stochastic < exact + 2**-7


def test_the_counter_exists_only_where_it_is_needed() -> None:
    for dtype, options, needed in (
        (torch.float32, {}, False),
        (torch.bfloat16, {}, False),
        (torch.float32, {"stochastic_rounding": True}, False),
        (torch.bfloat16, {"stochastic_rounding": True}, True),
        (torch.float32, {"momentum_dtype": "bfloat16", "stochastic_rounding": True}, True),
        (torch.float32, {"momentum_dtype": "int8"}, True),
        (torch.float32, {"momentum_dtype": "int8", "momentum": 0.0}, False),
    ):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = SGDSaI([p], **options)
        p.grad = torch.tensor([1.0, 2.0, 4.0]).to(dtype)
        optimizer.step()
        assert ("rounding_step" in optimizer.state[p]) == needed, (dtype, options)


def test_training_twice_is_the_same_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = train(True, torch.bfloat16, steps=20)
    assert train(True, torch.bfloat16, steps=20) == first
    torch.manual_seed(0)
    torch.randn(512)
    after = torch.get_rng_state()
    train(True, torch.bfloat16, steps=3)  # seeds, then draws its target only
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
