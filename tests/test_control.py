"""The authors' release 1.0.3 in the cases of this suite: the known-bad control, which shows that the cases can fail.

On several processes: tests/distributed/test_sharded.py. It agrees with one process under DDP, FSDP2, HSDP and tensor
parallelism as long as every block has a gradient at step 1 and neither one element nor a constant gradient.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sgd_sai import SGD_sai
from torch import Tensor, nn

from hf_sai import SGDSaI

Make = Callable[..., torch.optim.Optimizer]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def resumes_bitwise(make: Make) -> bool:
    whole, resumed = make_model(), make_model()
    one, other = make(whole.parameters()), make(resumed.parameters())
    train(whole, one, range(3))
    file = io.BytesIO()
    torch.save([whole.state_dict(), one.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(whole, one, range(3, 6))
    train(resumed, other, range(3, 6))
    return all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def survives_a_nan_in_the_first_gradient(make: Make) -> bool:
    model = make_model()
    optimizer = make(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    model[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def measures_fp16_gradients(make: Make) -> bool:
    p = nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    optimizer = make([p])
    p.grad = torch.linspace(-60000, 60000, 4096).half()
    exact = float(p.grad.double().norm() / p.grad.double().std())
    optimizer.step()
    return math.isclose(float(optimizer.state[p]["gsnr"]), exact, rel_tol=1e-6)


def keeps_the_g_snr_of_bf16_blocks(make: Make) -> bool:
    p = nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = make([p])
    p.grad = torch.randn(1000).bfloat16()
    exact = float(p.grad.double().norm() / p.grad.double().std())
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return math.isclose(float(optimizer.state[p]["gsnr"]), exact, rel_tol=1e-6)


def rounds_decay_and_update_once(make: Make) -> bool:
    """Decay and update of 0.52 half units: only their sum moves a bf16 weight of 1.0, their difference does not."""
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = make([p])
    half = torch.finfo(torch.bfloat16).eps / 4
    p.grad = torch.tensor([1.0, -1.0]).bfloat16()
    lr = 0.52 * half / 1.0  # sqrt(2) / sqrt(2) is the g-SNR
    optimizer.param_groups[0].update(lr=lr, weight_decay=0.52 * half / lr)
    optimizer.step()
    return p.tolist() == [1.0 - 2 * half, 1.0]


def trains_a_block_that_starts_late(make: Make) -> bool:
    model = make_model()
    optimizer = make(model.parameters())
    model[0](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    before = model[2].weight.detach().clone()
    try:
        train(model, optimizer, range(2))
    except KeyError:
        return False
    return not torch.equal(before, model[2].weight)


def refuses_a_flat_tensor(make: Make) -> bool:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    optimizer = make(params)
    flat: Tensor = torch.zeros(17)
    flat.grad = torch.randn(17)
    optimizer.param_groups[0]["params"] = [flat]
    try:
        optimizer.step()
    except ValueError:
        return True
    return False


CASES: list[Callable[[Make], bool]] = [
    resumes_bitwise,
    survives_a_nan_in_the_first_gradient,
    measures_fp16_gradients,
    keeps_the_g_snr_of_bf16_blocks,
    rounds_decay_and_update_once,
    trains_a_block_that_starts_late,
    refuses_a_flat_tensor,
]


@pytest.mark.filterwarnings("ignore:SGDSaI.*NaN or infinite:UserWarning")
@pytest.mark.filterwarnings("ignore:SGDSaI.*constant first gradient:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_holds_here_and_not_there(case: Callable[[Make], bool]) -> None:
    def ours(params: Any) -> SGDSaI:
        return SGDSaI(params, lr=1e-3, scaling="raw")

    def authors(params: Any) -> SGD_sai:
        return SGD_sai(params, lr=1e-3)

    assert case(ours)
    assert not case(authors)
