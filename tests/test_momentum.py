"""Momentum in fewer bits: what the int8 code loses, that it has no bias, that checkpoints keep every bit of it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI
from hf_sai.momentum import CODE_BLOCK, decode, encode, scale_count
from hf_sai.rounding import random_bits, rounding_key


def stored(values: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.numel(), dtype=torch.int8)
    scales = torch.empty(scale_count(values.numel()))
    encode(values, codes, scales, random_bits(rounding_key(torch.tensor(step), 0), 0, values.numel()))
    return codes, scales


@pytest.mark.parametrize("numel", [1, 2, 127, 128, 129, 4097])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_code_is_within_one_level_and_exact_at_the_largest(numel: int, size: float) -> None:
    values = torch.randn(numel) * size
    codes, scales = stored(values)
    held = decode(codes, scales)
    for block in range(scale_count(numel)):
        part = slice(block * CODE_BLOCK, (block + 1) * CODE_BLOCK)
        largest = values[part].abs().max()
        assert ((held - values)[part].abs() <= largest / 127 * (1 + 1e-5)).all()
        at = values[part].abs().argmax()
        torch.testing.assert_close(held[part][at], values[part][at], rtol=2e-7, atol=0)


def test_code_has_no_bias_where_rounding_to_nearest_loses_everything() -> None:
    values = torch.linspace(-0.4, 0.4, CODE_BLOCK) / 127  # all below half a level...
    values[0] = 1.0  # ...of a block whose largest element is 1
    n = 1500
    total = torch.zeros(CODE_BLOCK, dtype=torch.float64)
    for step in range(n):
        total += decode(*stored(values, step)).double()
    nearest = (values * 127).round() / 127
    assert not nearest[1:].any()
    # 128 means within 5 standard errors of at most half a level, and the 2^-16 of a level that 16 bits leave.
    assert ((total / n - values).abs() <= (0.5 * 5 / math.sqrt(n) + 2**-16) / 127).all()


def test_zero_stays_zero_and_outliers_stay_in_their_block() -> None:
    values = torch.zeros(3 * CODE_BLOCK)
    values[CODE_BLOCK] = 1e6
    values[-1] = 1e-3
    codes, scales = stored(values)
    held = decode(codes, scales)
    assert not held[values == 0].any()
    torch.testing.assert_close(held, values)
    assert (scales == 0).tolist() == [True, False, False]
    codes, scales = stored(torch.full((5,), 1e-40))  # too small for a scale with an inverse
    assert not decode(codes, scales).any()


def test_a_small_steady_gradient_survives_beside_a_large_one() -> None:
    """Each step adds an eightieth of a level to the momentum: rounding to nearest would drop it for ever."""
    p = nn.Parameter(torch.zeros(CODE_BLOCK))
    gradient = torch.full((CODE_BLOCK,), 1e-3)
    gradient[0] = 1.0
    optimizer = SGDSaI([p], lr=1e-3, weight_decay=0.0, scaling="raw", momentum_dtype="int8")
    exact = copy.deepcopy(p)
    reference = SGDSaI([exact], lr=1e-3, weight_decay=0.0, scaling="raw")
    for step in range(400):
        for q, o in ((p, optimizer), (exact, reference)):
            q.grad = gradient.clone()
            if not step:
                q.grad[1:] = 0
            o.step()
    ratio = (p[1:].mean() / exact[1:].mean()).item()
    assert abs(ratio - 1) < 0.05, ratio


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(momentum_buffer=s["momentum_buffer"].float()), "momentum_buffer of .* must be int8"),
        (lambda s: s.pop("momentum_scale"), r"has no 'momentum_scale', but int8 momentum needs it"),
        (lambda s: s.update(momentum_scale=torch.zeros(2)), r"the state dict has \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_int8_is_refused(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    p = nn.Parameter(torch.randn(300))
    optimizer = SGDSaI([p], momentum_dtype="int8")
    p.grad = torch.randn(300)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_state_bytes() -> None:
    p = nn.Parameter(torch.randn(128 * 1000))
    per_parameter = {}
    for name in ("float32", "bfloat16", "int8"):
        optimizer = SGDSaI([p], momentum_dtype=name)
        p.grad = torch.randn_like(p)
        optimizer.step()
        large = [x for x in optimizer.state[p].values() if x.numel() > 1]
        per_parameter[name] = sum(x.numel() * x.element_size() for x in large) / p.numel()
    assert per_parameter == {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 128}


def test_sharded_parameters_are_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
        optimizer = SGDSaI([("weight", p)], momentum_dtype="int8")
        p.grad = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
        with pytest.raises(
            ValueError, match=r"int8' does not support sharded parameters, but weight is a DTensor.*use 'bfloat16'"
        ):
            optimizer.step()
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- training


LR = 1e-2


def train(make_gpt2: Callable[..., Any], text: Tensor, steps: int, seed: int = 0, **options: Any) -> float:
    """Train a small GPT-2; the mean loss over the last tenth of the steps."""
    model = make_gpt2(seed=seed).train(False)
    optimizer = SGDSaI(model.parameters(), lr=LR, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        starts = torch.randint(0, len(text) - 33, (8,), generator=generator)
        batch = torch.stack([text[s : s + 32] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-steps // 10 :]) / (steps // 10)


def corpus(length: int = 20_000) -> Tensor:
    """A Markov chain over 64 tokens with four successors each: something to learn, with an entropy above zero."""
    generator = torch.Generator().manual_seed(5)
    following = torch.randint(1, 64, (64, 4), generator=generator)
    choices = torch.randint(0, 4, (length,), generator=generator).tolist()
    tokens = [1]
    for choice in choices:
        tokens.append(int(following[tokens[-1], choice]))
    return torch.tensor(tokens)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_final_loss_is_within_one_percent_of_float32_momentum(make_gpt2: Callable[..., Any]) -> None:
    text = corpus()
    losses = {name: train(make_gpt2, text, 2000, momentum_dtype=name) for name in ("float32", "bfloat16", "int8")}
    print(losses)
    assert losses["float32"] < 2.0  # it has learned: ln 63 = 4.14 is knowing nothing, ln 4 = 1.39 knowing all
    for name in ("bfloat16", "int8"):
        assert abs(losses[name] / losses["float32"] - 1) < 0.01, losses


def test_short_training_with_int8_follows_float32(make_gpt2: Callable[..., Any]) -> None:
    text = corpus(4000)
    exact, int8 = (train(make_gpt2, text, 60, momentum_dtype=name) for name in ("float32", "int8"))
    assert exact < 4.0
    assert abs(int8 / exact - 1) < 0.01
