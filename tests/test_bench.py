"""The benchmark: real models' shapes, a row for every optimizer also where one fails, figures that add up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sai.bench import rivals
from hf_sai.bench.measure import Row, bench, copy_bandwidth, state_bytes
from hf_sai.bench.paper import TABLES_1_AND_3
from hf_sai.bench.report import chart, table, write_json
from hf_sai.bench.rivals import RIVALS, Rival
from hf_sai.bench.shapes import MODELS, Model, model
from hf_sai.cli import main

SMALL = Model("small", [("wte.weight", (30, 8)), ("h.0.mlp.weight", (8, 8)), ("h.0.mlp.bias", (8,))], 8, 1)
NUMEL = 30 * 8 + 64 + 8
OURS = ["sgd_sai", "sgd_sai_foreach", "sgd_sai_bf16", "sgd_sai_int8"]


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("gpt2", "GPT2", {}),
        ("gpt2-xl", "GPT2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
        ("llama-2-7b", "Llama", {"vocab_size": 32000}),
    ],
)
def test_shapes_are_those_of_transformers(name: str, config: str, settings: dict[str, int]) -> None:
    import transformers

    with torch.device("meta"):
        built = getattr(transformers, {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[config])(
            getattr(transformers, f"{config}Config")(**settings, loss_type="ForCausalLM")
        )
    real = {n: tuple(p.shape) for n, p in built.named_parameters()}
    assert dict(model(name).shapes) == real


@pytest.mark.parametrize(("name", "parameters"), [("vit-s-16", 22_050_664), ("vit-h-14", 632_045_800)])
def test_vit_has_timms_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(math.prod(shape) for _, shape in model(name).shapes) == parameters


def test_lora_is_200_small_tensors() -> None:
    assert len(model("lora").shapes) == 200
    assert len({n for n, _ in model("lora").shapes}) == 200


def test_figures_of_a_row_add_up() -> None:
    result = bench("small", SMALL, optimizers=[*OURS, "sgd_fused", "adamw_fused"], steps=3)
    rows = {row.optimizer: row for row in result.rows}
    assert all(row.error is None and row.steps == 3 for row in rows.values())
    assert (result.parameters, result.tensors, result.in_turn) == (NUMEL, 3, True)
    # Momentum, and gsnr and scale of 3 blocks; a counter where rounding is stochastic, a scale for 128 codes.
    assert rows["sgd_sai"].state_bytes == 4 * NUMEL + 3 * 8
    assert rows["sgd_sai_bf16"].state_bytes == 2 * NUMEL + 3 * 8
    assert rows["sgd_sai_int8"].state_bytes == NUMEL + 3 * 16 + 4 * (2 + 1 + 1)
    assert rows["sgd_fused"].state_bytes == 4 * NUMEL
    for row in rows.values():
        assert row.moved_bytes == 3 * 4 * NUMEL + 2 * row.state_bytes
        assert row.gb_per_s == pytest.approx(row.moved_bytes / row.step_ms / 1e6)
        assert row.of_copy == pytest.approx(row.gb_per_s / result.copy_gb_per_s)
        assert row.quartiles_ms[0] <= row.step_ms <= row.quartiles_ms[1]
        assert row.peak_bytes is None  # the CPU's allocator does not tell


def test_a_rival_that_fails_or_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Model, named: Any) -> Any:
        raise RuntimeError("out of luck\nand more")

    def absent(model: Model, named: Any) -> Any:
        return rivals._installed("no_such_package_at_all", "X")

    monkeypatch.setitem(RIVALS, "broken", Rival("Broken", broken))
    monkeypatch.setitem(RIVALS, "absent", Rival("Absent", absent))
    result = bench("small", SMALL, optimizers=["broken", "sgd_sai", "absent", "adamw_8bit_torchao"], steps=1)
    assert [(row.optimizer, row.error) for row in result.rows] == [
        ("broken", "RuntimeError: out of luck"),
        ("sgd_sai", None),
        ("absent", "not installed: no_such_package_at_all"),
    ]
    assert "not installed: no_such_package_at_all" in table(result)


def test_past_the_deadline_nothing_is_begun() -> None:
    result = bench("small", SMALL, optimizers=["sgd_sai"], deadline=0.0)
    assert [row.error for row in result.rows] == ["not measured: out of time"]
    with pytest.raises(ValueError, match="no optimizer was measured"):
        chart("x.png", [result])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"optimizers must be among .*sgd_sai.*got nope"):
        bench("small", SMALL, optimizers=["nope"])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        bench("small", SMALL, optimizers=["sgd_sai"], steps=0)
    with pytest.raises(ValueError, match=r"model must be one of gpt2, .*, got 'gpt5'"):
        model("gpt5")


def test_the_papers_figures_stand_beside_ours_and_are_marked() -> None:
    result = bench("gpt2-xl", SMALL, optimizers=["sgd_sai", "adamw_fused", "adafactor"], steps=1)
    lines = table(result).splitlines()
    assert "ms (A100 80GB, paper)" in lines[1]
    assert lines[2].split()[-4:] == ["68", "±", "21", "5.93"]
    assert lines[3].split()[-4:] == ["138", "±", "6", "11.86"]
    assert not lines[4].rstrip().endswith(("5.93", "11.86"))
    assert "RTX 3090, paper: SGD-SaI step 340.1 ms, g-SNR calculation 267.6 ms" in table(result)
    assert {name for name, _ in TABLES_1_AND_3} <= set(MODELS)
    other = bench("gpt2-xl", SMALL, optimizers=["sgd_sai"], dtype=torch.bfloat16, steps=1)
    assert "paper" not in table(other)  # the paper's are float32


def test_json_and_chart_are_written_whole(tmp_path: Path) -> None:
    result = bench("small", SMALL, optimizers=["sgd_sai", "adamw_fused"], steps=2)
    path = write_json(tmp_path / "new" / "r.json", [result], note="x")
    content = json.loads(path.read_text())
    assert content["note"] == "x"
    assert [row["optimizer"] for row in content["results"][0]["rows"]] == ["sgd_sai", "adamw_fused"]
    assert chart(tmp_path / "c.svg", [result]).read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", [], value=math.nan)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c.svg", "new", "r.json"]


def test_copy_bandwidth_counts_bytes_read_and_written() -> None:
    assert 0.01 < copy_bandwidth(torch.device("cpu"), size=1 << 22, repetitions=3) < 10_000


def test_state_bytes_counts_a_shared_tensor_once() -> None:
    x = torch.zeros(10)
    assert state_bytes({"a": {"m": x, "v": [x, torch.zeros(3, dtype=torch.int8)]}, "b": {"m": x, "n": 4}}) == 43


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert "sgd_sai_authors" in capsys.readouterr().out
    arguments = ["bench", "--model", "lora", "--optimizers", "sgd_sai", "--steps", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    assert "LoRA, 200 tensors: 6,553,600 parameters" in out
    assert "SGD-SaI (hf_sai): first step" in err
    assert json.loads((tmp_path / "r.json").read_text())["versions"]["torch"] == torch.__version__
    assert main(["bench", "--model", "gpt5"]) == 1
    assert "error: model must be one of" in capsys.readouterr().err
    assert main(["bench", "--device", "nowhere"]) == 1
    assert "--device nowhere cannot be used" in capsys.readouterr().err


def test_claims_are_true_to_the_rows() -> None:
    from recipes.bench_step import claims

    result = bench("gpt2", SMALL, optimizers=["sgd_sai", "adamw_fused", "sgd_fused"], steps=1)
    row: Row = result.rows[0]
    row.step_ms, row.first_step_less_allocation_ms = 30.0, 75.0
    result.rows[1].step_ms, result.rows[2].step_ms = 40.0, 20.0
    found = {text: (value, limit) for text, value, limit in claims("cpu", [result])}
    assert found == {
        "gpt2 float32: sgd_sai / adamw_fused": (0.75, 1.05),
        "gpt2 float32: sgd_sai / sgd_sai_authors": (None, 0.70),
        "gpt2 float32: sgd_sai / sgd_fused": (1.5, 1.10),
        "gpt2 float32: sgd_sai first step / step": (2.5, 3.0),
    }
