"""The embedded diffusion case in its short form: pretraining, a LoRA by two optimizers, samples, table and pictures."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from recipes import diffusion_demo
from recipes.diffusion_data import open_image
from recipes.diffusion_demo import OPTIMIZERS, DemoArguments, demo, unseen

pytestmark = pytest.mark.xdist_group("diffusion")


def test_demo_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part runs, though the model obeys nothing yet. A second run takes the base as it is."""
    monkeypatch.setattr(diffusion_demo, "OPTIMIZERS", {name: OPTIMIZERS[name] for name in ("SGD-SaI raw", "AdamW")})
    small = {"lora_steps": 1, "samples": 1, "inference_steps": 1, "learning_rates": [1e-3]}
    record = demo(DemoArguments(str(tmp_path / "out"), pretrain_steps=1, pretrain_batch_size=2, **small))
    assert [(row["optimizer"], row["learning_rate"]) for row in record["runs"]] == [
        ("SGD-SaI raw", 0.1),
        ("AdamW", 1e-3),
    ]
    assert record["pretraining"]["steps"] == 1
    assert all(0 <= row["all"] <= row["object"] <= 1 for row in [*record["runs"], *record["base"].values()])
    # AdamW holds two moments and a step count; SGD-SaI one, with two scalars a block.
    ours, adamw = (row["optimizer_state_bytes"] for row in record["runs"])
    assert 0.45 < ours / adamw < 0.55
    assert json.loads((tmp_path / "out/record.json").read_text()) == record
    width, height = open_image(tmp_path / "out/grid.png").size
    assert width > 64 * len(unseen())
    assert height > 64 * 3
    assert "| AdamW | 0.001 |" in capsys.readouterr().out
    again = demo(DemoArguments(str(tmp_path / "again"), base=str(tmp_path / "out/base"), **small))
    assert again["base"] == record["base"]
    assert [row["all"] for row in again["runs"]] == [row["all"] for row in record["runs"]]
    assert not (tmp_path / "again/base").exists()
