"""The benchmark: real models' shapes, a row for every optimizer also where one fails, figures that add up."""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI
from hf_sai.bench import rivals
from hf_sai.bench.measure import Row, bench, copy_bandwidth
from hf_sai.bench.paper import TABLES_1_AND_3
from hf_sai.bench.report import chart, table, write_json
from hf_sai.bench.rivals import RIVALS, Rival, _is_embedding
from hf_sai.bench.shapes import MODELS, Model, model
from hf_sai.bench.state_bytes import optimizer_state_bytes
from hf_sai.cli import main
from hf_sai.state import scale_shapes

SMALL = Model("small", [("wte.weight", (30, 8)), ("h.0.mlp.weight", (8, 8)), ("h.0.mlp.bias", (8,))], 8, 1)
NUMEL = 30 * 8 + 64 + 8
OURS = ["sgd_sai", "sgd_sai_foreach", "sgd_sai_bf16", "sgd_sai_int8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 4 MB in place of 256, and no collection of garbage before each optimizer."""
    monkeypatch.setattr("hf_sai.bench.measure._release_memory", lambda device: None)
    monkeypatch.setattr("hf_sai.bench.measure.copy_bandwidth", partial(copy_bandwidth, size=1 << 22, repetitions=3))


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


def bytes_beside_momentum(shapes: Any) -> int:
    """Scales in float32, g-SNR in float32 and the count in int64 of each block."""
    numbers = 0
    for name, shape in shapes:
        group = {"scaling": "adamw", "token_rows": _is_embedding(name)}
        numbers += sum(size.numel() for size in scale_shapes(torch.Size(shape), group).values())
    return 4 * numbers + 12 * len(shapes)


def test_figures_of_a_row_add_up() -> None:
    result = bench("small", SMALL, optimizers=[*OURS, "sgd_fused", "adamw_fused"], steps=3)
    rows = {row.optimizer: row for row in result.rows}
    assert all(row.error is None and row.steps == 3 for row in rows.values())
    assert (result.parameters, result.tensors, result.in_turn) == (NUMEL, 3, True)
    # Momentum and the rest; a counter where rounding is stochastic, a scale for 128 codes.
    beside = bytes_beside_momentum(SMALL.shapes)
    assert rows["sgd_sai"].state_bytes == 4 * NUMEL + beside
    assert rows["sgd_sai_bf16"].state_bytes == 2 * NUMEL + beside
    assert rows["sgd_sai_int8"].state_bytes == NUMEL + beside + 3 * 8 + 4 * (2 + 1 + 1)
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


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_figures_are_told_as_they_come(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Before the next optimizer is made, whether they run in turn or one by one."""
    monkeypatch.setattr("hf_sai.bench.measure._SHARE", share)
    events: list[str] = []

    def make(model: Model, named: Any) -> Any:
        events.append("made")
        return torch.optim.SGD([p for _, p in named])

    monkeypatch.setitem(RIVALS, "last", Rival("Last", make))
    result = bench("small", SMALL, optimizers=["sgd_fused", "last"], steps=2, settling=1, progress=events.append)
    assert result.in_turn == (share > 0)
    before = events[: events.index("made")]
    pattern = r"SGD.*: first step \d+\.\d ms, then about \d+\.\d\d ms, state 0\.000 GB"
    assert re.fullmatch(pattern, before[0])
    assert len(before) == (1 if result.in_turn else 2)
    assert "2 steps of each in turn" in events if result.in_turn else events[-1].endswith(" ms a step")


def test_no_time_is_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation, measured apart, takes longer than the whole first step: what a busy machine can show."""
    monkeypatch.setattr("hf_sai.bench.measure._allocation_ms", lambda size, device: 1e9)
    result = bench("small", SMALL, optimizers=["sgd_fused"], steps=1)
    assert result.rows[0].first_step_less_allocation_ms == 0.0
    assert not re.search(r"-\d", table(result))


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


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances by 4 ms between two readings, which is 1 ms for each of four copies of 4 MB."""
    readings = itertools.count(0.0, 4e-3)
    monkeypatch.setattr("hf_sai.bench.measure.time", SimpleNamespace(perf_counter=lambda: next(readings)))
    assert copy_bandwidth(torch.device("cpu"), size=4_000_000, repetitions=3) == pytest.approx(8.0)


def test_state_bytes_are_those_of_the_tensors() -> None:
    model = nn.Linear(10, 6)  # 66 parameters
    loss = model(torch.randn(3, 10)).square().sum()
    loss.backward()
    adamw, ours = torch.optim.AdamW(model.parameters()), SGDSaI(model.parameters())
    adamw.step()
    ours.step()
    assert optimizer_state_bytes(adamw) == 2 * 66 * 4 + 2 * 4  # two moments; a step counter a parameter
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    assert optimizer_state_bytes(ours) == 66 * 4 + bytes_beside_momentum(shapes)


def test_state_bytes_find_nested_shared_and_wrapped_tensors() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any):
            self.optimizer = optimizer

    p, shared = torch.zeros(1), torch.zeros(8, dtype=torch.uint8)
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"deep": [{"m": torch.zeros(4, dtype=torch.bfloat16)}, (shared,)], "again": shared, "step": 3}
    assert optimizer_state_bytes(Wrapper(optimizer)) == 4 * 2 + 8


def test_state_bytes_of_a_sharded_tensor_are_the_local_ones() -> None:
    class Sharded(torch.Tensor):  # what DTensor offers, without a process group
        def to_local(self) -> torch.Tensor:
            return torch.zeros(3)

    p = torch.zeros(1)
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"m": torch.zeros(6).as_subclass(Sharded)}
    assert optimizer_state_bytes(optimizer) == 3 * 4


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert "sgd_sai_authors" in capsys.readouterr().out
    arguments = ["bench", "--model", "lora", "--optimizers", "sgd_sai", "--steps", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    assert "LoRA, 200 tensors: 6,553,600 parameters" in out
    assert re.search(r"  SGD-SaI \(hf_sai\): first step [\d.]+ ms, then about [\d.]+ ms, state 0\.0\d\d GB\n", err)
    assert json.loads((tmp_path / "r.json").read_text())["versions"]["torch"] == torch.__version__
    assert main(["bench", "--model", "gpt5"]) == 1
    assert "error: model must be one of" in capsys.readouterr().err
    assert main(["bench", "--device", "nowhere"]) == 1
    assert "--device nowhere cannot be used" in capsys.readouterr().err


def test_claims_are_true_to_the_rows() -> None:
    from recipes.bench.step import claims

    result = bench("gpt2", SMALL, optimizers=["sgd_sai", "adamw_fused", "sgd_fused"], steps=1)
    row: Row = result.rows[0]
    row.step_ms, row.first_step_less_allocation_ms = 30.0, 75.0
    result.rows[1].step_ms, result.rows[2].step_ms = 40.0, 20.0
    found = {text: (value, limit) for text, value, limit in claims("cpu", [result])}
    assert found == {
        "gpt2 float32: sgd_sai / adamw_fused": (0.75, 1.05),
        "gpt2 float32: sgd_sai / sgd_sai_authors": (None, 0.70),
        "gpt2 float32: sgd_sai / sgd_fused": (1.5, 1.10),
        "gpt2 float32: sgd_sai_no_decay / sgd_fused": (None, 1.10),
        "gpt2 float32: sgd_sai first step / step": (2.5, 3.0),
    }


# ------------------------------------------------------------------------------- the recipe: one command, its files


@pytest.fixture
def small_suites(monkeypatch: pytest.MonkeyPatch) -> Any:
    """step with the suites it has, but a small model in place of every real one."""
    from recipes.bench import step

    monkeypatch.setattr(step, "model", lambda name: SMALL)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return step


def written(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_one_command_measures_all_cores_and_one(
    small_suites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["step.py", "--steps", "2", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    small_suites.main()
    files = written(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bench_cpu.json",
        "bench_cpu.png",
        "bench_cpu_1thread.json",
        "bench_cpu_1thread.png",
    ]
    rows = {row["optimizer"]: row for one in files["bench_cpu.json"]["results"] for row in one["rows"]}
    assert rows.keys() == {key for key, rival in RIVALS.items() if rival.only != "cuda"}
    assert all(row["steps"] >= 1 or "not installed" in row["error"] for row in rows.values())
    assert {"sgd_sai", "adamw_fused"} < {
        row["optimizer"] for row in files["bench_cpu_1thread.json"]["results"][0]["rows"]
    }
    # A first step may take no longer than what its allocation takes when measured apart.
    assert all(claim["measured"] >= 0 for file in files.values() for claim in file["claims"])
    out = capsys.readouterr().out
    assert out.count("gpt2 float32: sgd_sai / adamw_fused") == 2
    assert "not measured" not in out.partition("bench_cpu.json")[2]


def test_the_command_for_a_gpu_is_ready(
    small_suites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the GPU: each part, on the CPU; without one it says so."""
    some = ["sgd_sai", "sgd_sai_authors", "adamw_fused", "adam_mini"]  # those that claims are made of
    arguments = ["--suite", "cuda", "--steps", "2", "--results", str(tmp_path), "--optimizers", *some]
    monkeypatch.setattr("sys.argv", ["step.py", *arguments])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            small_suites.main()
        assert "--suite cuda needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(small_suites, "bench", lambda *args, device, **options: bench(*args, device="cpu", **options))
    monkeypatch.setattr(small_suites, "run_tests", lambda: "3 passed")
    monkeypatch.setattr(small_suites, "machine", dict)
    release = small_suites.release
    run_all = release.run_all
    monkeypatch.setattr(
        release, "run_all", lambda config, device, steps, *rest: run_all(release.TINY, "cpu", 4, 16, 1e30)
    )
    small_suites.main()
    (content,) = written(tmp_path).values()
    assert [(one["model"], one["dtype"]) for one in content["results"]] == [
        ("gpt2-xl", "float32"),
        ("gpt2-xl", "bfloat16"),
        ("lora", "float32"),
        ("llama-2-7b", "bfloat16"),
        ("vit-h-14", "float32"),
        ("vit-s-16", "float32"),
        ("gpt2", "float32"),
    ]
    assert content["tests"] == "3 passed"
    assert [row["optimizer"] for row in content["full_fine_tuning"]] == list(release.RUNS)
    assert content["full_fine_tuning"][0]["all_losses_finite"]
    assert len(content["claims"]) == len(small_suites._CLAIMS["cuda"])
    assert all(claim["measured"] is not None for claim in content["claims"])
    assert (tmp_path / "bench_cuda.png").exists()
