"""The embedded diffusion case in its short form: pretraining, a LoRA by two optimizers, samples, table and pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from recipes.common.errors import UserError
from recipes.diffusion import demo
from recipes.diffusion.data import open_image
from recipes.diffusion.demo import CONTENDERS, DemoArguments, interval, unseen

pytestmark = pytest.mark.xdist_group("diffusion")


def test_demo_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part runs, though the model obeys nothing yet. A second start makes only what is not there."""
    few = {name: replace(CONTENDERS[name], learning_rates=(3e-3,)) for name in ("SGD-SaI raw", "AdamW")}
    monkeypatch.setattr(demo, "CONTENDERS", few)
    small = {"lora_steps": 1, "seeds": 1, "samples": 1, "inference_steps": 1, "size": 8, "channels": [8, 16]}
    config = DemoArguments(str(tmp_path / "out"), pretrain_steps=1, pretrain_batch_size=2, **small)
    record = demo.demo(config)
    assert [(row["optimizer"], row["learning_rate"]) for row in record["runs"]] == [
        ("SGD-SaI raw", 3e-3),
        ("AdamW", 3e-3),
    ]
    assert record["pretraining"]["steps"] == 1
    assert all(0 <= row["all"] <= row["object"] <= 1 for row in [*record["runs"], *record["base"].values()])
    # AdamW holds two moments and a step count; SGD-SaI one, with two scalars a block.
    ours, adamw = (row["optimizer_state_bytes"] for row in record["runs"])
    assert 0.45 < ours / adamw < 0.55
    assert json.loads((tmp_path / "out/record.json").read_text()) == record
    parts = [record["pretraining"], *record["runs"]]
    # Each of them is rounded to 0.1, a row of several seeds once a seed.
    assert record["cpu_seconds"] >= sum(part["cpu_seconds"] for part in parts) - 0.3
    width, height = open_image(tmp_path / "out/grid.png").size
    assert width > 64 * len(unseen())
    assert height > 64 * 3
    assert "| AdamW | 0.003 |" in capsys.readouterr().out

    # As if killed in the second run: the base and the first run stay, the second is made again and is the same.
    (tmp_path / "out/AdamW-0.003-seed0/scores.json").unlink()
    runs: list[str] = []
    train = demo.fine_tune
    monkeypatch.setattr(demo, "fine_tune", lambda *given: (runs.append(given[1].optim), train(*given))[1])
    monkeypatch.setattr(demo, "pretrain", None)
    again = demo.demo(config)
    assert len(runs) == 1
    assert again["runs"][0] == record["runs"][0]
    assert all(again["runs"][1][key] == record["runs"][1][key] for key in ("all", "object", "colour", "place"))
    assert again["base"] == record["base"]

    demo.demo(replace(config, lora_steps=2))  # another setting: nothing of the runs may be taken over
    assert len(runs) == 3
    two = demo.demo(replace(config, lora_steps=2, seeds=2))  # the first seed's runs are there
    assert len(runs) == 5
    row = two["runs"][0]
    assert (row["samples"], len(row["all_by_seed"])) == (2 * len(unseen()), 2)
    assert row["all"] == pytest.approx(sum(row["all_by_seed"]) / 2)
    given = demo.demo(replace(config, output_dir=str(tmp_path / "given"), base=str(tmp_path / "out/base")))
    assert given["base"] == record["base"]
    assert [row["all"] for row in given["runs"]] == [row["all"] for row in record["runs"]]
    assert not (tmp_path / "given/base").exists()


def test_optimizers_have_equally_many_tries() -> None:
    assert {len(contender.learning_rates) for contender in CONTENDERS.values()} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"channels": [12]}, "channels must be multiples of 8, got 12"),
        ({"size": 24, "channels": [8] * 5}, "size must be a multiple of 16 with 5 channels, got 24"),
    ],
)
def test_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DemoArguments(**settings)  # type: ignore[arg-type]


def test_interval_of_a_share() -> None:
    """Wilson's interval is where a share p has (share - p)^2 = z^2 p (1 - p) / n at both ends."""
    for share, n in ((0.0, 10), (0.8, 88), (1.0, 22)):
        low, high = interval(share, n)
        assert 0 <= low <= share <= high <= 1
        for p in {low, high} - {0.0, 1.0}:
            assert (share - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n)
