"""Gradient release trains as the ordinary step does, one batch later, and refuses what it cannot do right."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI
from hf_sai.options import SCALINGS
from hf_sai.release import release_gradients
from hf_sai.table import gsnr_table


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11))


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 11, (12,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens), tokens.flip(0))


def make(**options: Any) -> tuple[nn.Module, SGDSaI]:
    model = make_model()
    return model, SGDSaI(model.named_parameters(), lr=0.02, **options)


@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        *((s, o) for s in SCALINGS for o in ({}, {"momentum_dtype": "int8"}, {"momentum_init": "zero"})),
        ("floor", {"clip_threshold": 0.3}),
    ],
)
def test_equals_the_ordinary_step_whose_first_lr_is_zero(scaling: str, options: dict[str, Any]) -> None:
    (released, one), (plain, other) = (make(scaling=scaling, **options) for _ in range(2))
    start = copy.deepcopy(released)
    release_gradients(one, released)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5) for o in (one, other)]
    for step in range(8):
        loss = loss_of(released, step)
        loss.backward()
        assert all(p.grad is None for p in released.parameters())
        one.step()
        other.zero_grad()
        loss_of(plain, step).backward()
        if step == 0:
            lr, other.param_groups[0]["lr"] = other.param_groups[0]["lr"], 0.0
        other.step()
        if step == 0:
            other.param_groups[0]["lr"] = lr
            assert all(torch.equal(p, q) for p, q in zip(released.parameters(), start.parameters(), strict=True))
            assert all(row.calibrated for row in gsnr_table(one, released))
        for schedule in schedules:
            schedule.step()
    for p, q in zip(released.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in one.state[p].items():
            assert torch.equal(value, other.state[q][name]), name
    assert not torch.equal(next(released.parameters()), next(start.parameters()))


def test_each_gradient_is_freed_before_the_next_is_made() -> None:
    model, optimizer = make()
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    release_gradients(optimizer, model)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
    assert alive == [1] * 15


def test_a_checkpoint_goes_on_without_calibrating_again() -> None:
    model, optimizer = make(scaling="adamw")
    release_gradients(optimizer, model)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
    twin, resumed = make(scaling="adamw")
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    release_gradients(resumed, twin)
    for step in range(3, 6):
        for m, o in ((model, optimizer), (twin, resumed)):
            loss_of(m, step).backward()
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_loading_into_a_released_optimizer_keeps_it_released() -> None:
    model, optimizer = make()
    release_gradients(optimizer, model)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(model)
    loss_of(model, 1).backward()
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(model[1].weight, before[1].weight)


def test_a_block_whose_first_gradient_is_zero_waits() -> None:
    """As LoRA's A, whose gradient is zero until B has moved."""
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3, 4))
    model = nn.ParameterList([a, b])
    optimizer = SGDSaI(model.parameters(), lr=0.01, weight_decay=0.0)
    release_gradients(optimizer, model)
    seen = []
    for _ in range(4):
        before = [p.detach().clone() for p in model]
        (torch.randn(5, 4) @ a @ b).sub(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        calibrated = [bool(optimizer.state[p]["scale"]) for p in model]
        moved = [not torch.equal(p, old) for p, old in zip(model, before, strict=True)]
        seen.append((calibrated, moved))
    # B is calibrated, B moves, A is calibrated at its first gradient that is not zero, A moves.
    assert seen == [
        ([False, True], [False, False]),
        ([False, True], [False, True]),
        ([True, True], [False, True]),
        ([True, True], [True, True]),
    ]


def test_norm_is_that_of_the_gradients() -> None:
    (released, one), (plain, other) = make(), make()
    release_gradients(one, released, track_norm=True)
    assert one.released_norm is None
    for step in range(3):
        released.load_state_dict(plain.state_dict())
        loss_of(released, step).backward()
        other.zero_grad()
        loss_of(plain, step).backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        torch.testing.assert_close(one.released_norm, expected)
        one.step()
        torch.testing.assert_close(one.released_norm, expected)
        other.step()


def test_remove_ends_it() -> None:
    model, optimizer = make()
    handle = release_gradients(optimizer, model)
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="active already"):
        release_gradients(optimizer, model)
    handle.remove()
    before = model[1].weight.detach().clone()
    loss_of(model, 1).backward()
    assert model[1].weight.grad is not None
    assert torch.equal(model[1].weight, before)
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    release_gradients(optimizer, model)


# ------------------------------------------------------------------------------------- what it refuses


def test_accumulation_is_refused_before_any_harm() -> None:
    model, optimizer = make()
    release_gradients(optimizer, model)
    loss_of(model, 0).backward()
    optimizer.step()
    loss_of(model, 1).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"second gradient before step.*cannot be accumulated.*call step\(\) after"):
        loss_of(model, 2).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_gradscaler_is_refused_before_any_harm() -> None:
    model, optimizer = make()
    before = copy.deepcopy(model)
    release_gradients(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    # GradScaler itself finds no gradient to look at, unless our own error comes first.
    with pytest.raises((RuntimeError, AssertionError), match=r"GradScaler|No inf checks"):
        scaler.step(optimizer)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"cannot be used with GradScaler.*bfloat16"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_gradient_that_the_hooks_did_not_see_is_refused() -> None:
    model, optimizer = make()
    model[3].bias.requires_grad_(False)
    release_gradients(optimizer, model)
    model[3].bias.requires_grad_(True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"3\.bias has a gradient that release_gradients did not see"):
        optimizer.step()


def test_another_models_parameters_are_refused() -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match=r"the model does not hold 0\.weight"):
        release_gradients(optimizer, make_model())


@pytest.fixture
def group() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp2"])
def test_models_whose_gradients_are_reduced_are_refused(wrapped: str) -> None:
    model = make_model()
    if wrapped == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = SGDSaI(model.parameters())
    with pytest.raises(ValueError, match=r"cannot be used with .*(Distributed|FSDP).*before gradients are reduced"):
        release_gradients(optimizer, model)


@pytest.mark.usefixtures("group")
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, optimizer = make()
    with pytest.raises(ValueError, match="cannot be used with 2 processes"):
        release_gradients(optimizer, model)


def test_small_gpt2_learns(make_gpt2: Callable[..., Any], token_dataset: Any) -> None:
    """Tied embeddings, activation checkpointing, bfloat16 and int8 momentum, all at once."""
    model = make_gpt2(dtype=torch.bfloat16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    # transformers 6 keeps the first name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    optimizer = SGDSaI(
        model.parameters(), lr=5e-3, scaling="adamw", momentum_dtype="int8", stochastic_rounding=True, weight_decay=0.0
    )
    release_gradients(optimizer, model)
    batch = torch.stack([row["input_ids"] for row in token_dataset[:8]])
    losses = []
    for _ in range(40):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]  # the first batch only calibrates
    assert losses[-1] < losses[0] - 1.0


# ------------------------------------------------------------------------------------------ the Trainer


def arguments(folder: Path, **options: Any) -> Any:
    from hf_sai import SaITrainingArguments

    settings = {"max_grad_norm": 0.0, "optim_args": "release_gradients=true,momentum_dtype=int8", "max_steps": 4}
    return SaITrainingArguments(
        str(folder), report_to="none", logging_steps=1, use_cpu=True, learning_rate=5e-3, **{**settings, **options}
    )


def test_trainer_logs_the_true_norm_and_learning_rate(
    tmp_path: Path, make_gpt2: Callable[..., Any], token_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sai import SaITrainer

    norms, rates = [], []

    class Watching(SaITrainer):
        def training_step(self, model: nn.Module, *rest: Any, **kwargs: Any) -> Tensor:
            seen: list[Tensor] = []
            hooks = [p.register_hook(lambda g: seen.append(g.detach().clone())) for p in model.parameters()]
            rates.append(self.optimizer.param_groups[0]["lr"])
            loss = super().training_step(model, *rest, **kwargs)
            for hook in hooks:
                hook.remove()
            norms.append(torch.nn.utils.get_total_norm(seen).item())
            assert all(p.grad is None for p in model.parameters())
            return loss

    trainer = Watching(make_gpt2(), arguments(tmp_path), train_dataset=token_dataset)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx(rates)
    # transformers before 5.3 logs the norm only when it clips.
    if any("grad_norm" in entry for entry in logged):
        assert [entry["grad_norm"] for entry in logged] == pytest.approx(norms, rel=1e-4)
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    state = next(iter(trainer.optimizer.state.values()))
    assert state["momentum_buffer"].dtype == torch.int8


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_grad_norm": 1.0}, "excludes max_grad_norm=1.0: the norm is known only after .* set it to 0"),
        ({"gradient_accumulation_steps": 2}, "excludes gradient_accumulation_steps=2: .* set it to 1"),
    ],
)
def test_trainer_says_what_excludes_it(
    options: dict[str, Any], reason: str, tmp_path: Path, make_gpt2: Callable[..., Any], token_dataset: Any
) -> None:
    from hf_sai import SaITrainer

    trainer = SaITrainer(make_gpt2(), arguments(tmp_path, **options), train_dataset=token_dataset)
    with pytest.raises(ValueError, match=reason):
        trainer.train()


def test_the_ways_without_a_model_say_so(tmp_path: Path, make_gpt2: Callable[..., Any]) -> None:
    from hf_sai import create_sgd_sai, sgd_sai_from_args

    with pytest.raises(ValueError, match="needs the model: use SaITrainer or create_sgd_sai"):
        sgd_sai_from_args(arguments(tmp_path))
    optimizer, _ = create_sgd_sai(make_gpt2(), arguments(tmp_path), 10)
    assert optimizer.releases_gradients
