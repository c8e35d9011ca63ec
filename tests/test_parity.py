"""The paper's scalings against the authors' release and Algorithm 1 in float64; the default against AdamW."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sgd_sai import SGD_sai
from torch import Tensor, nn

from hf_sai import SGDSaI
from hf_sai.channels import channels

STEPS = 20
ODD_SHAPES = [(2,), (3, 1), (50, 16), (7, 3, 2, 2), (1000, 37), (1, 129)]


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def random_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(p) * (0.01 + i) + 0.1 * i for i, p in enumerate(params)]


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def algorithm_1(
    params: list[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    lr: float,
    momentum: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> list[Tensor]:
    """Algorithm 1 of the paper line by line, in float64, but for eps, which stands beside the standard deviation."""
    theta = [p.double() for p in params]
    m: list[Tensor] = []
    alpha: list[Tensor] = []
    for t, step in enumerate(gradients):
        g = [-x.double() if maximize else x.double() for x in step]
        if t == 0:
            snr = [x.norm() / (x.std() + eps) for x in g]
            alpha = [s / max(snr) for s in snr]
            m = g
        else:
            m = [momentum * old + (1 - momentum) * new for old, new in zip(m, g, strict=True)]
        theta = [(1 - lr * weight_decay) * p - lr * a * v for p, a, v in zip(theta, alpha, m, strict=True)]
    return theta


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], steps: int = STEPS) -> None:
    """Each step rounds a parameter and its momentum a few times: 8 roundings a step of the largest element."""
    for a, b in zip(found, expected, strict=True):
        bound = 8 * steps * torch.finfo(torch.float32).eps * b.abs().max().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_raw_equals_the_authors_release(foreach: bool, weight_decay: float, momentum: float) -> None:
    ours = parameters(ODD_SHAPES)
    theirs = copy.deepcopy(ours)
    gradients = [random_gradients(ours) for _ in range(STEPS)]
    options: dict[str, Any] = {"lr": 1e-3, "momentum": momentum, "weight_decay": weight_decay}
    run(SGDSaI(ours, scaling="raw", foreach=foreach, **options), ours, gradients)
    run(SGD_sai(theirs, **options), theirs, gradients)
    assert_close(ours, theirs)


def test_raw_equals_the_authors_release_on_gpt2(make_gpt2: Callable[..., Any]) -> None:
    ours, theirs = make_gpt2().eval(), make_gpt2().eval()
    a, b = SGDSaI(ours.parameters(), lr=1e-3, scaling="raw"), SGD_sai(theirs.parameters(), lr=1e-3)
    for step in range(STEPS):
        batch = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        losses = []
        for model, optimizer in ((ours, a), (theirs, b)):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.state[p]["gsnr"].item() == pytest.approx(b.state[q]["gsnr"].item(), rel=2e-6)
        # The two models' own gradients differ in the last bits from step 2 on: roundings of the model, not ours.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_max_equals_algorithm_1(foreach: bool, maximize: bool) -> None:
    params = parameters(ODD_SHAPES)
    gradients = [random_gradients(params) for _ in range(STEPS)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "eps": 1e-8, "weight_decay": 0.05, "maximize": maximize}
    expected = algorithm_1([p.detach() for p in params], gradients, **options)
    run(SGDSaI(params, scaling="max", foreach=foreach, **options), params, gradients)
    assert_close(params, expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_momentum_it_is_scaled_sgd(foreach: bool) -> None:
    params = parameters(ODD_SHAPES)
    gradients = [random_gradients(params) for _ in range(STEPS)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "eps": 1e-8, "weight_decay": 0.05}
    expected = algorithm_1([p.detach() for p in params], gradients, **options)
    optimizer = SGDSaI(params, scaling="max", foreach=foreach, **options)
    run(optimizer, params, gradients)
    assert_close(params, expected)
    assert all(set(state) == {"gsnr", "scale", "calibration_step"} for state in optimizer.state.values())


@pytest.mark.parametrize("foreach", [False, True])
def test_the_first_update_of_each_channel_has_the_size_of_adamws(foreach: bool) -> None:
    ours = parameters(ODD_SHAPES)
    theirs = copy.deepcopy(ours)
    before = [p.detach().double() for p in ours]
    # No element reaches twice the root mean square of its channel, where ours are bounded.
    gradients = [[(1 + torch.rand_like(p)) * torch.randn_like(p).sign() for p in ours]]
    run(SGDSaI(ours, lr=1e-3, weight_decay=0.0, foreach=foreach), ours, gradients)
    run(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0, eps=0.0), theirs, gradients)
    for p, q, start in zip(ours, theirs, before, strict=True):
        over = tuple(range(p.dim())) if p.dim() == 2 else channels(p.shape).dims
        sizes = [(x.double() - start).square().mean(over).sqrt() for x in (p, q)]
        # A weight of size 4 is rounded to 2^-22 after a step of 1e-3. The scale of a matrix's element is made from its
        # row and its column, whose sizes differ by chance.
        torch.testing.assert_close(*sizes, rtol=0.25 if p.dim() == 2 else 1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_foreach_equals_per_tensor_below_float32(dtype: torch.dtype, momentum: float) -> None:
    """Both compute in float32 and round once; float32's own last bit may tip a rounding, by one unit a step."""
    one = [nn.Parameter(p.detach().to(dtype)) for p in parameters(ODD_SHAPES)]
    two = copy.deepcopy(one)
    gradients = [random_gradients(one) for _ in range(STEPS)]
    for params, foreach in ((one, False), (two, True)):
        run(SGDSaI(params, lr=1e-2, momentum=momentum, foreach=foreach), params, gradients)
    for p, q in zip(one, two, strict=True):
        tipped = (p != q).float().mean().item()
        assert tipped < 1e-3
        torch.testing.assert_close(p, q, rtol=0, atol=torch.finfo(dtype).eps * q.abs().max().item())
