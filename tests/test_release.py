"""Gradient release trains bit for bit as ordinary steps do, and refuses what it cannot do right."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sai import SGDSaI
from hf_sai.calibration import INTERVAL
from hf_sai.release import release_gradients
from hf_sai.table import gsnr_table


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11))


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 11, (12,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens), tokens.flip(0))


def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, SGDSaI]:
    model = make_model().to(dtype)
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "token_rows": options.get("scaling") is None}, {"params": named[1:]}]
    return model, SGDSaI(groups, lr=0.02, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": "raw"},
        {"momentum_dtype": "int8"},
        {"momentum": 0.0},
        {"stochastic_rounding": True},
        {"foreach": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_ordinary_steps(dtype: torch.dtype, options: dict[str, Any]) -> None:
    (released, one), (plain, other) = (make(dtype, **options) for _ in range(2))
    release_gradients(one, released)
    for step in range(INTERVAL + 2):
        loss_of(released, step).backward()
        assert all(p.grad is None for p in released.parameters())
        one.step()
        other.zero_grad()
        loss_of(plain, step).backward()
        other.step()
    assert_equal(released, one, plain, other)
    assert all(row.calibrated for row in gsnr_table(one, released))


def assert_equal(released: nn.Module, one: SGDSaI, plain: nn.Module, other: SGDSaI) -> None:
    for p, q in zip(released.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in one.state[p].items():
            assert torch.equal(value, other.state[q][name]), name
    assert [group["step"] for group in one.param_groups] == [group["step"] for group in other.param_groups]


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
    with pytest.raises(ValueError, match="already active"):
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


def test_gradscaler_is_refused() -> None:
    """Whether gradients overflow is known only after the last one, when all are applied and gone."""
    model, optimizer = make()
    release_gradients(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):  # GradScaler's own
        scaler.step(optimizer)


@pytest.mark.parametrize("scaling", ["max"])
def test_a_scaling_that_compares_all_blocks_is_refused(scaling: str) -> None:
    model, optimizer = make(scaling=scaling)
    with pytest.raises(ValueError, match=r"scaling='max', which compares .* use scaling='adamw' or 'raw'"):
        release_gradients(optimizer, model)


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
    with pytest.raises(ValueError, match=r"the model does not contain 0\.weight"):
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
    with pytest.raises(ValueError, match=r"does not work with .*(Distributed|FSDP).*before gradients are reduced"):
        release_gradients(optimizer, model)


@pytest.mark.usefixtures("group")
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, optimizer = make()
    with pytest.raises(ValueError, match="does not work with 2 processes"):
        release_gradients(optimizer, model)


def test_small_gpt2_learns(make_gpt2: Callable[..., Any], token_dataset: Any) -> None:
    """Tied embeddings, activation checkpointing, bfloat16 and int8 momentum, all at once."""
    model = make_gpt2(dtype=torch.bfloat16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    # transformers 6 keeps the first name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    optimizer = SGDSaI(model.parameters(), lr=5e-3, momentum_dtype="int8", stochastic_rounding=True, weight_decay=0.0)
    release_gradients(optimizer, model)
    batch = torch.stack([row["input_ids"] for row in token_dataset[:8]])
    losses = []
    for _ in range(40):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]  # the first batch trains, too
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
