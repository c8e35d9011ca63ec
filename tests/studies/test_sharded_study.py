"""The counts of the sharding study: state and collectives by hand, and beside real tensors and real steps."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sai import SGDSaI, param_groups
from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.calibration import INTERVAL, WINDOW
from recipes.common.errors import UserError
from recipes.common.provenance import sealed
from recipes.studies import sharded

LAYERS, WIDTH, MLP, VOCABULARY = 2, 32, 64, 128


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=MLP, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2, 8])
def rows(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The rows of both optimizers on so many devices."""
    return {row["optimizer"]: row for row in sharded.count(tiny(), request.param, torch.float32)}


# Rows and columns of every matrix, and the norms, which are one channel each.
LAYER = [(WIDTH, WIDTH), (WIDTH // 2, WIDTH), (WIDTH // 2, WIDTH), (WIDTH, WIDTH), *[(MLP, WIDTH)] * 2, (WIDTH, MLP)]
MATRICES = [*LAYER * LAYERS, (VOCABULARY, WIDTH), (VOCABULARY, WIDTH)]
NORMS = 2 * LAYERS + 1
ELEMENTS = sum(rows * columns for rows, columns in MATRICES) + NORMS * WIDTH
ROWS, COLUMNS = sum(rows for rows, _ in MATRICES), sum(columns for _, columns in MATRICES)
BLOCKS = len(MATRICES) + NORMS


def test_bytes_of_a_device(rows: dict[str, Any]) -> None:
    """Each dimension divides by the devices. A row is split, columns, norms' scales and g-SNR are held by all."""
    ours, theirs = rows["SGD-SaI"], rows["AdamW"]
    devices = ours["devices"]
    assert ours["parameters"] == ELEMENTS
    assert {row[key] for row in (ours, theirs) for key in ("parameter_bytes", "gradient_bytes")} == {
        4 * ELEMENTS // devices
    }
    copied = COLUMNS + NORMS + BLOCKS
    assert ours["state_bytes"] == 4 * ((ELEMENTS + ROWS) // devices + copied)
    assert ours["state_bytes_of_all"] == 4 * (ELEMENTS + ROWS + copied * devices)
    assert ours["beside_state_bytes"] == 4 * COLUMNS  # their factors, made from the scales
    assert theirs["state_bytes"] == 2 * 4 * ELEMENTS // devices
    assert theirs["state_bytes_of_all"] == 2 * 4 * ELEMENTS
    assert theirs["beside_state_bytes"] == 0
    assert (ours["host_state_bytes"], theirs["host_state_bytes"]) == (8 * BLOCKS, 4 * BLOCKS)


def test_collectives_of_each_kind_of_step(rows: dict[str, Any]) -> None:
    """In float64: two sums for g-SNR, one for usable gradients, one for the channels that shards divide."""
    of_blocks, of_channels = 8 * BLOCKS, 8 * (COLUMNS + NORMS)
    steps = {kind: step["collectives"] for kind, step in rows["SGD-SaI"]["steps"].items()}
    assert steps == {
        "first": {"allreduce_": {"number": 4, "bytes": 3 * of_blocks + of_channels}},
        "calibration": {"allreduce_": {"number": 2, "bytes": of_blocks + of_channels}},
        "ordinary": {},
        "measuring": {"allreduce_": {"number": 1, "bytes": of_channels}},
    }
    assert all(step["collectives"] == {} for step in rows["AdamW"]["steps"].values())


def test_bytes_that_ordinary_steps_move(rows: dict[str, Any]) -> None:
    """By the operations of the foreach paths: 13 operands and 8 results of AdamW's have the size of a parameter."""
    size = rows["AdamW"]["parameter_bytes"]
    theirs, ours = (rows[name]["steps"]["ordinary"] for name in ("AdamW", "SGD-SaI"))
    host = 100 * BLOCKS  # numbers of steps, and scalars
    assert 13 * size <= theirs["read_bytes"] <= 13 * size + host
    assert 8 * size <= theirs["written_bytes"] <= 8 * size + host
    assert theirs["peak_bytes"] == size  # sqrt of the second moments
    # Gradient times row scale, times column factor, both bounds, momentum, decay, update; norms have no column factor.
    norms = rows["SGD-SaI"]["parameter_bytes"] * NORMS * WIDTH // ELEMENTS
    assert 9 * size - norms <= ours["read_bytes"] <= 9 * size + 8 * (ROWS + COLUMNS + BLOCKS)
    assert abs(ours["written_bytes"] - (7 * size - norms)) < 8
    assert 0 < ours["peak_bytes"] <= size


def test_one_device_has_the_state_of_real_tensors_that_are_not_sharded() -> None:
    model = LlamaForCausalLM(tiny())
    optimizer = SGDSaI(param_groups(model), lr=1e-5, foreach=True)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    adamw.step()
    counted = {row["optimizer"]: row for row in sharded.count(tiny(), 1, torch.float32)}
    for name, real in (("SGD-SaI", optimizer), ("AdamW", adamw)):
        assert counted[name]["state_bytes"] + counted[name]["host_state_bytes"] == optimizer_state_bytes(real)


def test_the_steps_that_the_study_skips() -> None:
    """A run of a whole window and the next 11 steps has the same counts as the steps that the study takes for them."""
    measuring = WINDOW + INTERVAL - 1
    with sharded.fake_processes(2) as mesh:
        model = sharded.sharded_model(tiny(), mesh, torch.float32)
        optimizer, counter = SGDSaI(param_groups(model), lr=1e-5, foreach=True), sharded.Counter()
        steps = []
        for i in range(WINDOW + INTERVAL + 1):
            if i in (1, WINDOW, measuring):
                steps.append(sharded.count_step(optimizer, counter))
                continue
            counter.start()
            with counter:
                optimizer.step()
            steps.append({"collectives": counter.collectives})
    study = {row["optimizer"]: row for row in sharded.count(tiny(), 2, torch.float32)}["SGD-SaI"]["steps"]
    assert steps[0]["collectives"] == study["first"]["collectives"]
    assert [step["collectives"] for step in steps[1:WINDOW]] == [study["calibration"]["collectives"]] * (WINDOW - 1)
    assert [step["collectives"] for step in steps[WINDOW:measuring]] == [{}] * (INTERVAL - 1)
    assert steps[measuring + 1]["collectives"] == {}
    assert steps[1] == study["calibration"]
    assert steps[WINDOW] == study["ordinary"]
    assert steps[measuring] == study["measuring"]


def test_the_study_writes_a_sealed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sharded.SHAPES, "7b", (WIDTH, LAYERS, 4, 2, MLP))
    path = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["sharded.py", "--models", "7b", "--devices", "2", "--record", str(path)])
    sharded.main()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert sealed(record) == record
    assert record["config"] == {"models": ["7b"], "devices": [2], "dtype": "float32"}
    assert [(row["model"], row["devices"], row["optimizer"]) for row in record["rows"]] == [
        ("7b", 2, "AdamW"),
        ("7b", 2, "SGD-SaI"),
    ]


def test_what_the_study_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sharded.py", "--devices", "8", "0"])
    with pytest.raises(UserError, match="--devices must be at least 1, got 0; leave it out"):
        sharded.main()
    with (
        sharded.fake_processes(2),
        pytest.raises(UserError, match="a process group exists already; run the study in"),
        sharded.fake_processes(2),
    ):
        pass
    assert not torch.distributed.is_initialized()
