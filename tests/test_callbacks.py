"""gsnr_table and GSNRCallback: the right numbers under the right names, where people look for them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sai import GSNRCallback, SaITrainer, SaITrainingArguments, SGDSaI, create_sgd_sai, gsnr_table
from hf_sai import callbacks as callbacks_module


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def step(model: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_table_before_and_after_the_first_step() -> None:
    model = two_layers()
    optimizer = SGDSaI(list(model.parameters())[::-1], lr=1e-2, scaling="raw")
    assert gsnr_table(optimizer, model) == [
        ("0.weight", (3, 4), 12, 0.0, 0.0, False),
        ("0.bias", (3,), 3, 0.0, 0.0, False),
        ("1.weight", (2, 3), 6, 0.0, 0.0, False),
        ("1.bias", (2,), 2, 0.0, 0.0, False),
    ]
    assert not optimizer.state, "looking must not make state"
    step(model, optimizer, torch.randn(8, 4))
    for row, p in zip(gsnr_table(optimizer, model), model.parameters(), strict=True):
        wanted = p.grad.double().norm() / (p.grad.double().std() + 1e-8)
        assert row.gsnr == pytest.approx(wanted.item(), rel=1e-5)
        assert row.scale == row.gsnr
        assert row.calibrated


def test_table_of_a_partly_calibrated_model() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = SGDSaI(model.parameters(), lr=1e-2, scaling="max")
    step(model, optimizer, torch.randn(8, 4))
    rows = {row.name: row for row in gsnr_table(optimizer, model)}
    assert [row.calibrated for row in rows.values()] == [False, False, True, True]
    assert max(row.scale for row in rows.values()) == 1.0


def test_table_names_wrapped_and_unknown_parameters() -> None:
    model = two_layers()
    stray = nn.Parameter(torch.ones(5))
    optimizer = SGDSaI([{"params": model.parameters()}, {"params": [stray]}])
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "param_groups[1].params[0]"]
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert [row.name for row in gsnr_table(optimizer, wrapped)] == names


def test_table_lists_tied_weights_once_and_untrained_ones_never(make_gpt2: Callable[..., Any]) -> None:
    model = make_gpt2()
    model.transformer.wpe.requires_grad_(False)
    optimizer, _ = create_sgd_sai(model, TrainingArguments("out", **ways.QUIET), 1)
    names = [row.name for row in gsnr_table(optimizer, model)]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_table_refuses_other_optimizers() -> None:
    model = two_layers()
    with pytest.raises(TypeError, match="optimizer must be an SGDSaI, got AdamW; only SGDSaI measures g-SNR"):
        gsnr_table(torch.optim.AdamW(model.parameters()), model)


class Reporter(TrainerCallback):
    """Stands for an integration: keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.sent.append((state.global_step, dict(logs)))


def trained(folder: Path, rows: list[Any], model: Any, callbacks: list[Any], **settings: Any) -> Trainer:
    steps = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    args = SaITrainingArguments(str(folder), **{**ways.QUIET, **steps, **settings})
    trainer = SaITrainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("first", [True, False], ids=["reporter first", "reporter last"])
def test_callback_tells_every_reporter_once(
    first: bool, make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    reporter = Reporter()
    callbacks = [reporter, GSNRCallback()] if first else [GSNRCallback(), reporter]
    trainer = trained(tmp_path, token_dataset, make_gpt2(), callbacks, optim_args="scaling=raw")
    rows = gsnr_table(trainer.optimizer, trainer.model)
    wanted = {f"gsnr/{row.name}": row.gsnr for row in rows} | {f"scale/{row.name}": row.scale for row in rows}
    told = [(step, logs) for step, logs in reporter.sent if any(key.startswith("gsnr/") for key in logs)]
    assert [step for step, _ in told] == [2], "once, at the first logging step"
    assert told[0][1] == {**wanted, "epoch": pytest.approx(2 / 12)}
    kept = [entry for entry in trainer.state.log_history if "gsnr/transformer.wte.weight" in entry]
    assert kept == [{**told[0][1], "step": 2}]
    # The Trainer's own entries are left as they were.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("given", [True, False])
def test_callback_in_a_stock_trainer_tells_the_reporters_of_the_trainer_it_is_given(
    given: bool,
    make_gpt2: Callable[..., Any],
    token_dataset: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not given one it keeps the values, and says that the trackers are not told."""
    monkeypatch.setattr(callbacks_module.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(callbacks_module.logger, "propagate", False)
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    reporter, steps = Reporter(), {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4}
    settings = {**ways.QUIET, **steps, "learning_rate": 1e-2, "optim": "sgd_sai", "report_to": "tensorboard"}
    args = TrainingArguments(str(tmp_path), **settings)  # type: ignore[arg-type]
    trainer = Trainer(make_gpt2(), args, train_dataset=token_dataset, callbacks=[reporter])
    trainer.add_callback(GSNRCallback(every=2, trainer=trainer if given else None))
    trainer.train()
    rows = {f"gsnr/{row.name}": row.gsnr for row in gsnr_table(trainer.optimizer, trainer.model)}
    kept = [entry for entry in trainer.state.log_history if rows.keys() <= entry.keys()]
    assert [{key: entry[key] for key in rows} for entry in kept] == [rows]
    told = [logs for _, logs in reporter.sent if any(key.startswith("gsnr") for key in logs)]
    assert len(told) == (1 + 2 if given else 0), "the table once, a measurement at steps 1 and 3"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([] if given else [WITHOUT_A_TRAINER])


WITHOUT_A_TRAINER = (
    "GSNRCallback has no Trainer, so its values are only in log_history and not sent to tensorboard; add it with "
    "trainer.add_callback(GSNRCallback(trainer=trainer)), or use SaITrainer"
)


def test_callback_tells_of_blocks_calibrated_later(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    class Thaw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.transformer.wpe.weight.requires_grad_(state.global_step >= 3)

    model, reporter = make_gpt2(), Reporter()
    args = SaITrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, **ways.QUIET
    )
    pair = create_sgd_sai(model, args, 6)
    model.transformer.wpe.weight.requires_grad_(False)
    callbacks = [reporter, GSNRCallback(), Thaw()]
    trainer = SaITrainer(model, args, train_dataset=token_dataset, callbacks=callbacks, optimizers=pair)
    trainer.train()
    late = "gsnr/transformer.wpe.weight"
    told = {step: logs for step, logs in reporter.sent if "gsnr/transformer.wte.weight" in logs or late in logs}
    assert list(told) == [2, 4]
    assert late not in told[2]
    assert set(told[4]) == {late, "scale/transformer.wpe.weight", "epoch"}


def test_callback_tells_at_the_end_of_a_run_that_never_logs(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    reporter = Reporter()
    trained(tmp_path, token_dataset, make_gpt2(), [GSNRCallback(), reporter], logging_strategy="no")
    assert sum("gsnr/transformer.wte.weight" in logs for _, logs in reporter.sent) == 1


def test_callback_writes_to_tensorboard(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = make_gpt2()
    trainer = trained(tmp_path, token_dataset, model, [GSNRCallback()], report_to="tensorboard")
    # transformers 4.57 has its own place for the folder.
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for row in gsnr_table(trainer.optimizer, model):
        (point,) = events.Scalars(f"train/gsnr/{row.name}")
        assert (point.step, point.value) == (2, row.gsnr)
    assert len(events.Scalars("train/loss")) == 3


def test_callback_keeps_its_numbers_off_the_console(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for disable_tqdm in (True, False):
        trained(tmp_path, token_dataset, make_gpt2(), [GSNRCallback()], disable_tqdm=disable_tqdm)
        printed = capsys.readouterr()
        assert "loss" in printed.out
        assert "gsnr" not in printed.out + printed.err


def test_callback_is_kept_in_the_saved_state(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    trained(tmp_path, token_dataset, make_gpt2(), [GSNRCallback()], save_strategy="steps", save_steps=4)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert any(math.isfinite(entry.get("gsnr/transformer.wte.weight", math.nan)) for entry in saved["log_history"])


def test_callback_refuses_other_optimizers(
    token_dataset: list[Any], make_gpt2: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="optimizer must be an SGDSaI, got AdamW"):
        trained(tmp_path, token_dataset, make_gpt2(), [GSNRCallback()], optim="adamw_torch")
