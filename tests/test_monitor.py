"""GSNRCallback(every=N): the g-SNR of each gradient as it is, the drift of the scales, and a record that goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from test_callbacks import Reporter
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sai import GSNRCallback, SaITrainer, SaITrainingArguments, SGDSaI, gsnr_table
from hf_sai.channels import channels
from hf_sai.monitor import Measured, measure_gradients, read_record, recalibrated, write_json
from hf_sai.release import release_gradients

STEPS = 6


class Gradients(TrainerCallback):
    """Keeps every gradient that the optimizer is handed, in float64."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps[state.global_step + 1] = {name: p.grad.double() for name, p in model.named_parameters()}


def gsnr(g: torch.Tensor) -> float:
    return float(g.norm() / (g.std() + 1e-8))


def settings(folder: Path, **given: Any) -> dict[str, Any]:
    own = {"max_steps": STEPS, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return {"output_dir": str(folder), **ways.QUIET, **own, **given}


def train(folder: Path, rows: list[Any], model: Any, callbacks: list[Any], **given: Any) -> Trainer:
    args = SaITrainingArguments(**settings(folder, **given))
    trainer = SaITrainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=given.get("resume_from_checkpoint"))
    return trainer


def test_it_measures_what_the_optimizer_takes(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    """Accumulated and clipped gradients; each value at its own step, to the reporters, the log and the record."""
    seen, reporter = Gradients(), Reporter()
    trainer = train(
        tmp_path,
        token_dataset,
        make_gpt2(),
        [seen, reporter, GSNRCallback(every=2)],
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
    )
    told = {step: logs for step, logs in reporter.sent if any(key.startswith("gsnr_now/") for key in logs)}
    assert list(told) == [1, 3, 5]
    record = read_record(tmp_path / "gsnr.json")
    assert (record["steps"], record["every"]) == ([1, 3, 5], 2)
    assert {block["name"] for block in record["blocks"]} == set(seen.steps[1])
    rows = {row.name: row for row in gsnr_table(trainer.optimizer, trainer.model)}
    for block in record["blocks"]:
        name = block["name"]
        for i, step in enumerate(record["steps"]):
            wanted = gsnr(seen.steps[step][name])
            assert told[step][f"gsnr_now/{name}"] == pytest.approx(wanted, rel=1e-5)
            assert block["gsnr_now"][i] == pytest.approx(wanted, rel=1e-5)
        assert block["shape"] == list(rows[name].shape)
        assert (block["gsnr"], block["scale"]) == pytest.approx((rows[name].gsnr, rows[name].scale), rel=1e-5)
        assert block["gsnr_now"][0] == block["gsnr"]
    assert sum("gsnr/transformer.wte.weight" in logs for _, logs in reporter.sent) == 1, "as without `every`"


@pytest.mark.parametrize("scaling", ["raw", "max"])
def test_drift_is_what_a_calibration_now_would_make_of_the_scale(
    scaling: str, make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    seen = Gradients()
    train(tmp_path, token_dataset, make_gpt2(), [seen, GSNRCallback(every=1)], optim_args=f"scaling={scaling}")
    record = read_record(tmp_path / "gsnr.json")
    for i, step in enumerate(record["steps"]):
        # An optimizer that meets this step's gradients first.
        fresh = {name: nn.Parameter(torch.zeros_like(g)) for name, g in seen.steps[step].items()}
        optimizer = SGDSaI(fresh.values(), lr=1.0, scaling=scaling)
        for name, p in fresh.items():
            p.grad = seen.steps[step][name]
        optimizer.step()
        for block in record["blocks"]:
            wanted = optimizer.state[fresh[block["name"]]]["scale"].item() / block["scale"]
            assert block["drift"][i] == pytest.approx(wanted, rel=2e-5)  # six digits, twice
            if step == 1:
                assert block["drift"][i] == pytest.approx(1.0, rel=1e-5)
    drifts = [drift for block in record["blocks"] for drift in block["drift"]]
    assert max(drifts) > 1.001, "the test would see nothing"


def test_drift_in_adamws_units_is_the_gradient_so_far_in_units_of_the_gradient_now(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    """Of the block as a whole: within the window its scale is made of the gradients so far, each counting alike."""
    seen = Gradients()
    trainer = train(tmp_path, token_dataset, make_gpt2(), [seen, GSNRCallback(every=1)])
    record = read_record(tmp_path / "gsnr.json")
    for block in record["blocks"]:
        gradients = [seen.steps[step][block["name"]] for step in record["steps"]]
        rms = torch.stack([g.square().mean(channels(g.shape).dims).sqrt() for g in gradients])
        for i, drift in enumerate(block["drift"]):
            held = rms[: i + 1].mean(0).square().mean() / rms[i].square().mean()
            # Scales hold eps = 1e-8 beside gradients of channels, of which the smallest are near 1e-4.
            assert drift == pytest.approx(held.sqrt().item(), rel=2e-4)
    assert all(row.calibrated for row in gsnr_table(trainer.optimizer, trainer.model))


def test_looking_changes_no_weight(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path, snapshot: Callable[..., Any]
) -> None:
    plain = train(tmp_path / "a", token_dataset, make_gpt2(), [])
    watched = train(tmp_path / "b", token_dataset, make_gpt2(), [GSNRCallback(every=1)])
    first, second = snapshot(plain.model), snapshot(watched.model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "a" / "gsnr.json").exists()


def test_the_record_goes_on_after_a_resume(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    train(tmp_path / "whole", token_dataset, make_gpt2(), [GSNRCallback(every=2)])
    saved = {"save_strategy": "steps", "save_steps": 4}
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(folder, token_dataset, make_gpt2(), [GSNRCallback(every=2), Killed()], **saved)
    assert not (folder / "gsnr.json").exists()
    again = {**saved, "resume_from_checkpoint": str(folder / "checkpoint-4")}
    train(folder, token_dataset, make_gpt2(), [GSNRCallback(every=2)], **again)
    assert (folder / "gsnr.json").read_text() == (tmp_path / "whole" / "gsnr.json").read_text()


def test_any_optimizer_will_do(make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path) -> None:
    seen = Gradients()
    args = TrainingArguments(**settings(tmp_path, optim="adamw_torch"))
    trainer = Trainer(make_gpt2(), args, train_dataset=token_dataset, callbacks=[seen, GSNRCallback(every=5)])
    trainer.train()
    record = read_record(tmp_path / "gsnr.json")
    assert record["steps"] == [1, 6]
    for block in record["blocks"]:
        assert (block["gsnr"], block["scale"], block["drift"]) == (None, None, None)
        assert block["gsnr_now"][1] == pytest.approx(gsnr(seen.steps[6][block["name"]]), rel=1e-5)
    keys = {key.partition("/")[0] for entry in trainer.state.log_history for key in entry if "/" in key}
    assert keys == {"gsnr_now"}


def test_a_block_without_a_usable_gradient_has_no_value(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(2))]}])
    model[0].weight.grad = torch.randn(2, 3)
    model[0].bias.grad = torch.tensor([math.nan, 1.0])
    measured = {m.name: m.statistics.kind for m in measure_gradients(optimizer, model)}
    assert measured == {
        "0.weight": "usable",
        "0.bias": "nonfinite",
        "1.weight": "zero",
        "1.bias": "zero",
        "param_groups[1].params[0]": "zero",
    }
    assert recalibrated([Measured("a", None, measure_gradients(optimizer, model)[0].statistics)]) == {}


def test_where_gradients_are_not_to_be_seen(
    make_gpt2: Callable[..., Any], token_dataset: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"every must be a whole number of at least 1 optimizer step, or None.*got 0"):
        GSNRCallback(every=0)
    model = nn.Linear(2, 2)
    optimizer = SGDSaI(model.parameters())
    release_gradients(optimizer, model)
    with pytest.raises(ValueError, match=r"release_gradients, which frees each gradient.*train without rel"):
        measure_gradients(optimizer, model)
    wrapper = type("Wrapper", (), {"__module__": "accelerate.utils.deepspeed", "optimizer": optimizer})()
    with pytest.raises(ValueError, match="under DeepSpeed, which steps within backward"):
        measure_gradients(wrapper, model)
    flat = nn.Linear(2, 2)
    flat.weight._fsdp_flattened = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"under FSDP1.*use FSDP2"):
        measure_gradients(torch.optim.SGD(flat.parameters()), flat)


def test_records_are_read_back_or_refused(tmp_path: Path) -> None:
    values = [i / 7 for i in range(30)]
    content = {"format": 1, "steps": [1, 2], "blocks": [{"name": "a\u00e9", "gsnr_now": [*values, None]}], "empty": {}}
    path = write_json(tmp_path / "deep" / "gsnr.json", content)
    assert read_record(path) == content
    assert json.dumps([*values, None]) in path.read_text(), "a list of numbers has one line"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": math.nan})
    assert read_record(path) == content, "a failed write leaves the old file"
    assert [item.name for item in path.parent.iterdir()] == ["gsnr.json"]
    for bad, says in ((b"{", "is not a g-SNR"), (b"[]", "must be a gsnr.json"), (b"\xff", "is not a g-SNR record")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=says):
            read_record(path)
    path.write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(ValueError, match="in format 1"):
        read_record(path)
