"""Mixed precision, overflow, spikes, clipping and accumulation, each with the number it must give."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import scale_of_elements
from torch import Tensor, nn

from hf_sai import SaITrainer, SaITrainingArguments, SGDSaI
from hf_sai.calibration import LIMIT, WINDOW

SCALINGS = ["adamw", "raw", "max"]
LR = {"raw": 1e-3, "max": 1e-2, "adamw": 1e-2}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def batch(step: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 24, generator=generator), torch.randn(rows, 5, generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)).float() - y).square().mean()


def gsnrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [optimizer.state[p]["gsnr"].item() for g in optimizer.param_groups for p in g["params"]]


def exact_gsnr(grad: Tensor, eps: float = 1e-8) -> float:
    grad = grad.double()
    return float(grad.norm() / (grad.std() + eps))


def copies(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The low precision of the gradients.


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, scaling: str) -> None:
    """float32 parameters: the g-SNR is exact for the gradients there are, and near that of float32 training."""
    full, model = make_model(), make_model()
    loss_of(full, 0).backward()
    expected = [exact_gsnr(p.grad) for p in full.parameters()]
    optimizer = SGDSaI(model.parameters(), lr=LR[scaling], scaling=scaling)
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, 0)
    loss.backward()
    here = [exact_gsnr(p.grad) for p in model.parameters()]
    optimizer.step()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert gsnrs(optimizer) == pytest.approx(here, rel=1e-6)
    # A gradient element has the relative rounding of its dtype a few times; a ratio of two norms averages over them.
    assert gsnrs(optimizer) == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision(dtype: torch.dtype, scaling: str) -> None:
    """Statistics in float32; decay and update in float32, rounded once: the oracle is float64 rounded at each step."""
    model = make_model(dtype)
    optimizer = SGDSaI(model.parameters(), lr=1e-3, weight_decay=0.1, scaling=scaling)
    weights = [p.detach().double() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        grads = [p.grad.double() for p in model.parameters()]
        if not step:
            expected = [exact_gsnr(g) for g in grads]
        optimizer.step()
        # Momentum is stored in the dtype of the parameter; what is taken from it is not rounded.
        new = 0.1 / (1 - 0.9 ** (step + 1)) if scaling == "adamw" else 0.1 if step else 1.0
        for i, p in enumerate(model.parameters()):
            state = optimizer.state[p]
            scaled = scale_of_elements(state) * grads[i]
            if scaling == "adamw":
                scaled = scaled.clamp(-LIMIT, LIMIT)
            m = buffers[i] + new * (scaled - buffers[i])
            exact = (1 - 1e-4) * weights[i] - 1e-3 * m
            # Rounded once: at most half a unit in the last place, and a little where float32 stood on an edge.
            unit = torch.finfo(dtype).eps * torch.maximum(exact.abs(), torch.tensor(torch.finfo(dtype).tiny))
            assert ((p.double() - exact).abs() <= 0.51 * unit).all()
            weights[i], buffers[i] = p.detach().double(), state["momentum_buffer"].double()
    assert gsnrs(optimizer) == pytest.approx(expected, rel=1e-6)


def test_fp16_gradients_whose_norm_overflows() -> None:
    """A sum of squares over 65504 is infinite in float16."""
    p = nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    optimizer = SGDSaI([p], lr=1e-3, weight_decay=0.0)
    p.grad = torch.linspace(-60000, 60000, 4096).half() + 16
    optimizer.step()
    state, rms = optimizer.state[p], p.grad.double().square().mean().sqrt().item()
    assert state["gsnr"].item() == pytest.approx(exact_gsnr(p.grad), rel=1e-6)
    assert state["scale"].item() == pytest.approx(1 / rms, rel=1e-5)
    torch.testing.assert_close(p.float(), -1e-3 * state["scale"] * p.grad.float(), rtol=2**-11, atol=1e-7)


# What a QLoRA model holds.


def test_mixed_dtypes() -> None:
    """Frozen bytes, a frozen bf16 base, float32 adapters and norm, a bf16 head: in one group, each in its own dtype."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16, bias=False).bfloat16().requires_grad_(False)
    packed = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    a = nn.Parameter(torch.randn(4, 16))
    b = nn.Parameter(torch.zeros(16, 4))
    norm = nn.Parameter(torch.ones(16))
    head = nn.Parameter(torch.randn(3, 16).bfloat16())
    optimizer = SGDSaI([p for p in (base.weight, a, b, norm, head) if p.requires_grad], lr=1e-3)
    before = copies([base.weight, packed])
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        hidden = base(x.bfloat16()).float() + (x @ a.T) @ b.T
        output = (hidden * norm).bfloat16() @ head.T
        optimizer.zero_grad()
        output.float().square().mean().backward()
        if step == 0:
            expected = {q: exact_gsnr(q.grad) for q in (b, norm, head)}
        if step == 1:
            expected[a] = exact_gsnr(a.grad)  # B was zero: no gradient for A at step 0
        optimizer.step()
        assert (optimizer.state[a]["gsnr"].item() > 0) == (step > 0)
    for p, gsnr in expected.items():
        assert optimizer.state[p]["gsnr"].item() == pytest.approx(gsnr, rel=1e-6)
        assert optimizer.state[p]["gsnr"].dtype == torch.float32
        assert optimizer.state[p]["momentum_buffer"].dtype == p.dtype
    assert equal([base.weight, packed], before)


# Overflow.


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("overflows", [(0,), (1,), (0, 1), (3,), (0, 2, 3)])
def test_overflow_under_grad_scaler(overflows: tuple[int, ...], scaling: str) -> None:
    """Steps that overflow change nothing; the others are those of a run that never saw the bad batches."""
    whole, model = make_model(), make_model()
    reference = SGDSaI(whole.parameters(), lr=LR[scaling], scaling=scaling)
    optimizer = SGDSaI(model.parameters(), lr=LR[scaling], scaling=scaling)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            model[2].weight.grad[1, 2] = math.inf
        before, state = copies(model.parameters()), flat_state(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in overflows:
            assert equal(copies(model.parameters()), before)
            assert not any(gsnrs_or_zero(optimizer)) if step == 0 else flat_state(optimizer) == state
        else:
            reference.zero_grad()
            loss_of(whole, step).backward()
            reference.step()
    # Scales are powers of two: multiplying and dividing by them is exact.
    assert equal(copies(model.parameters()), copies(whole.parameters()))
    assert gsnrs(optimizer) == gsnrs(reference)


def flat_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value.tolist() for state in optimizer.state_dict()["state"].values() for _, value in sorted(state.items())]


def gsnrs_or_zero(optimizer: torch.optim.Optimizer) -> list[float]:
    return [state["gsnr"].item() for state in optimizer.state.values() if "gsnr" in state]


@pytest.mark.filterwarnings("ignore:SGDSaI.*NaN or infinite:UserWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_nan_in_the_first_gradient_of_one_block(bad: float, scaling: str) -> None:
    """That block stays as it is until its gradient is finite; the others never notice."""
    model, whole = make_model(), make_model()
    optimizer = SGDSaI(model.parameters(), lr=LR[scaling], scaling=scaling)
    blocks = [p for name, p in whole.named_parameters() if name != "2.weight"]
    reference = SGDSaI(blocks, lr=LR[scaling], scaling=scaling)
    before = model[2].weight.detach().clone()
    loss_of(model, 0).backward()
    loss_of(whole, 0).backward()
    model[2].weight.grad[3, 3] = bad
    optimizer.step()
    reference.step()
    others = [p for name, p in model.named_parameters() if name != "2.weight"]
    assert torch.equal(model[2].weight, before)
    assert optimizer.state[model[2].weight]["gsnr"] == 0
    assert equal(copies(others), copies(blocks))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    expected = exact_gsnr(model[2].weight.grad)
    optimizer.step()
    assert optimizer.state[model[2].weight]["gsnr"].item() == pytest.approx(expected, rel=1e-6)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# Spikes, clipping, accumulation, warm-up.


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_loss_spike(scaling: str) -> None:
    """A gradient 1e6 times as large moves no scale of the paper's; in AdamW's units it counts as 2."""
    model = make_model()
    optimizer = SGDSaI(model.parameters(), lr=1e-3, weight_decay=0.0, scaling=scaling)
    for step in range(WINDOW if scaling == "adamw" else 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    before = copies(model.parameters())
    buffers = [optimizer.state[p]["momentum_buffer"].double() for p in model.parameters()]
    scales = copies(optimizer.state[p]["scale"] for p in model.parameters())
    optimizer.zero_grad()
    (1e6 * loss_of(model, 1)).backward()
    optimizer.step()
    for p, start, buffer, scale in zip(model.parameters(), before, buffers, scales, strict=True):
        assert torch.equal(optimizer.state[p]["scale"], scale)
        update = scale.double() * p.grad.double()
        if scaling == "adamw":
            update = update.clamp(-LIMIT, LIMIT)
        m = 0.9 * buffer + 0.1 * update
        size = 1e-3 * (buffer.abs() + 0.1 * update.abs()) + start.abs()
        error = (p.double() - (start.double() - 1e-3 * m)).abs()
        assert (error <= 4 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_clipping_keeps_the_g_snr(scaling: str) -> None:
    """Clipped by a factor c, the first update is c times as large, apart from AdamW's units, which undo c."""
    updates = []
    for limit in (math.inf, 1e-2):
        model = make_model()
        optimizer = SGDSaI(model.parameters(), lr=LR[scaling], weight_decay=0.0, eps=0.0, scaling=scaling)
        loss_of(model, 0).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        before = copies(model.parameters())
        optimizer.step()
        updates.append(torch.cat([(p - q).flatten().double() for p, q in zip(model.parameters(), before, strict=True)]))
        known = gsnrs(optimizer) if limit == math.inf else known  # noqa: F821 - set in the first round
        assert gsnrs(optimizer) == pytest.approx(known, rel=1e-6)
    factor = 1.0 if scaling == "adamw" else 1e-2 / (norm.item() + 1e-6)
    # The updates are read from weights below 0.3, which are rounded to float32.
    tolerance = 4 * 0.3 * torch.finfo(torch.float32).eps
    assert (updates[1] - factor * updates[0]).abs().max() < tolerance


@pytest.mark.parametrize("scaling", SCALINGS)
def test_learning_rate_0_at_step_1(scaling: str) -> None:
    """Warm-up starts at 0: the weights stay, the blocks are calibrated all the same."""
    model, other = make_model(), make_model()
    optimizer = SGDSaI(model.parameters(), lr=0.0, scaling=scaling)
    reference = SGDSaI(other.parameters(), lr=LR[scaling], scaling=scaling)
    before = copies(model.parameters())
    loss_of(model, 0).backward()
    loss_of(other, 0).backward()
    optimizer.step()
    reference.step()
    assert equal(copies(model.parameters()), before)
    assert gsnrs(optimizer) == gsnrs(reference)
    assert min(gsnrs(optimizer)) > 0
    assert equal(
        [optimizer.state[p]["scale"] for p in model.parameters()],
        [reference.state[p]["scale"] for p in other.parameters()],
    )


@pytest.mark.parametrize("scaling", ["raw", "adamw"])
def test_accumulation_is_a_larger_batch(
    scaling: str, make_gpt2: Callable[..., Any], token_dataset: list[dict[str, Tensor]], tmp_path: Any
) -> None:
    """8x1 and 1x8 in the Trainer: the same loss at every step, weights whose difference is rounding, without a bias."""
    runs = []
    for size, accumulated in ((8, 1), (1, 8)):
        model = make_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        settings: dict[str, Any] = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "max_steps": 6,
            "learning_rate": LR[scaling],
            "optim_args": f"scaling={scaling}",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = SaITrainingArguments(str(tmp_path / str(size)), **settings)
        trainer = SaITrainer(model, args, train_dataset=token_dataset)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, torch.cat([p.detach().double().flatten() for p in model.parameters()])))
    (losses, weights), (accumulated_losses, accumulated_weights) = runs
    assert len(losses) == 6
    eps = torch.finfo(torch.float32).eps
    assert accumulated_losses == pytest.approx(losses, rel=64 * eps, abs=1e-4)
    residual = accumulated_weights - weights
    begin = torch.cat([p.detach().double().flatten() for p in make_gpt2().parameters()])
    moved = (weights - begin).square().mean().sqrt().item()
    assert moved > 1e-4
    assert residual.square().mean().sqrt().item() < 1e-3 * moved
    # No bias: the mean is that of as many independent errors, within five standard errors.
    assert abs(residual.mean().item()) < 5 * residual.std().item() / math.sqrt(residual.numel())
