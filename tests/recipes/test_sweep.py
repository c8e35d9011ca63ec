"""The sweep: which runs it plans, what it takes for the best, that it goes on where it stopped, and real runs."""

import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hf_sai import SGDSaI
from recipes.common import optimizers, provenance
from recipes.common.config import parse_config
from recipes.common.e2e_data import Group
from recipes.common.errors import UserError
from recipes.common.files import finite, write_json, write_text
from recipes.common.records import machine, versions
from recipes.e2e.train import predictions_table
from recipes.pretrain.train import ModelArguments, PretrainArguments
from recipes.sweep import report as report_module
from recipes.sweep import run as engine
from recipes.sweep import tables
from recipes.sweep.report import best_points, curves, larger_is_better, pareto, pareto_front, read_results
from recipes.sweep.run import Sweep, do, finals, planned, report

ROOT = Path(__file__).parents[2]


def content(folder: Path, **changes):
    return {
        "recipe": "pretrain",
        "base": str(folder / "base.yaml"),
        "grid": {"learning_rate": ["1e-3", "1e-2", "1e-1"]},
        "runs": {
            "ours": {"options": {"optim": "sgd_sai"}},
            "theirs": {"options": {"optim": "sgdm"}, "grid": {"learning_rate": [0.5, 1.0]}},
        },
        "options": {"max_steps": 3},
        "output": str(folder / "out"),
        "results": str(folder / "results" / "name"),
    } | changes


def read(folder: Path, **changes) -> Sweep:
    (folder / "s.yaml").write_text(yaml.safe_dump(content(folder, **changes)))
    if not (folder / "base.yaml").exists():
        (folder / "text.txt").write_text("a text")
        (folder / "base.yaml").write_text(f"seed: 0\ntrain_files: [{folder}/text.txt]\ntokenizer: train\n")
    return Sweep.read(folder / "s.yaml")


def test_plan_takes_turns_between_optimizers_and_tells_each_run_its_options(tmp_path):
    sweep = read(tmp_path, seeds=[0, 1], grid={"learning_rate": [1e-3], "weight_decay": [0.0, 0.1]})
    runs = planned(sweep)
    assert [run.label for run in runs] == [
        *("ours_0.001_0.0_seed0", "theirs_0.5_0.0_seed0", "ours_0.001_0.0_seed1", "theirs_0.5_0.0_seed1"),
        *("ours_0.001_0.1_seed0", "theirs_0.5_0.1_seed0", "ours_0.001_0.1_seed1", "theirs_0.5_0.1_seed1"),
        *("theirs_1.0_0.0_seed0", "theirs_1.0_0.0_seed1", "theirs_1.0_0.1_seed0", "theirs_1.0_0.1_seed1"),
    ]
    options = {"max_steps": 3, "optim": "sgd_sai", "learning_rate": 1e-3, "weight_decay": 0.0, "seed": 0}
    assert runs[0].options == options
    words = [f"--{key}={value}" for key, value in options.items()]
    base = str(tmp_path / "base.yaml")
    assert runs[0].words(tmp_path) == ["--config", base, f"--output_dir={tmp_path}", *words]
    assert runs[0].command == " ".join(["python -m recipes.pretrain base.yaml", *words])


def row(run: str, rate: float, value: float | None, seed: int = 0) -> dict:
    return {"run": run, "point": {"learning_rate": rate}, "seed": seed, "value": value, "optimizer_state_bytes": 8}


def test_best_is_the_best_mean_over_seeds_and_says_when_it_lies_at_the_edge():
    rows = [
        *(row("a", rate, value, seed) for rate, pair in {1.0: (3, 5), 2.0: (3.5, 3.7), 4.0: (1, None)}.items()
          for seed, value in enumerate(pair)),
        *(row("b", rate, rate) for rate in (1.0, 2.0, 3.0)),
    ]  # fmt: skip
    best = best_points(rows, "eval_loss")
    assert best["a"] == {"point": {"learning_rate": 2.0}, "value": pytest.approx(3.6), "at_edge": []}
    assert best["b"]["at_edge"] == ["learning_rate"]
    assert best_points(rows[-1:], "eval_loss")["b"]["at_edge"] == [], "one value is no grid"
    assert best_points(rows[-2:], "eval_loss")["b"]["at_edge"] == ["learning_rate"]
    assert best_points(rows, "final.eval_top1")["b"]["point"] == {"learning_rate": 3.0}
    assert larger_is_better("final.eval_top1")
    assert not larger_is_better("eval_loss")
    assert curves(rows, "learning_rate")["a"] == [(1.0, 4.0), (2.0, 3.6), (4.0, 1.0)]


def test_pareto_front():
    assert pareto_front([(2, 1.0), (1, 3.0), (3, 2.0), (2, 2.0), (4, 0.5)]) == [1, 0, 4]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A sweep whose runs are stood in for, in this process: the loss is a known function of the learning rate."""
    started: list[str] = []

    def stand_in(run):
        started.append(run.label)
        rate = float(run.options["learning_rate"])
        if rate == 0.5:
            return "ValueError: no"
        loss = math.nan if rate >= 1 else 3 + abs(math.log10(rate) + 2) + run.seed
        record = {"final": {"eval_loss": loss}, "diverged": rate >= 1, "steps": run.options["max_steps"]}
        record |= {"optimizer_state_bytes": 8, "speed": {"step_ms": 1.5}, "data_digests": run.settings["data"]}
        origin = {"commit": "c" * 40, "clean": True, "machine": machine(), "versions": versions(), "device": "a CPU"}
        texts = predictions_table(
            [Group("name[A]", []), Group("name[B]", [])], [f'A "fine" place, seed {run.seed}.', ""]
        )
        write_text(run.folder / "predictions.tsv", texts)
        write_json(run.folder / "record.json", record | origin)
        return None

    class Now:
        """A pool that does the work at once."""

        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, *args):
            from concurrent.futures import Future

            task = Future()
            task.set_result(function(*args))
            return task

    monkeypatch.setattr(engine, "perform", stand_in)
    monkeypatch.setattr(engine, "ProcessPoolExecutor", Now)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the sweep sets it: as it was, after the test
    return started


def test_sweep_goes_on_where_it_stopped_and_repeats_the_best_at_length(tmp_path, made, monkeypatch, capsys):
    sweep = read(tmp_path, final={"options": {"max_steps": 9}, "seeds": [0, 1], "texts": ["ours"]})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml")])
    with pytest.raises(UserError, match=r"1 runs failed, see run.log in .*: theirs_0.5_seed0"):
        engine.main()
    assert made == [
        *("ours_1e-3_seed0", "theirs_0.5_seed0", "ours_1e-2_seed0", "theirs_1.0_seed0", "ours_1e-1_seed0"),
        *("ours_1e-2_seed0_final", "theirs_1.0_seed0_final", "ours_1e-2_seed1_final", "theirs_1.0_seed1_final"),
    ]
    found = json.loads((tmp_path / "results" / "name.json").read_text())
    assert found["best"]["ours"] == {"point": {"learning_rate": 0.01}, "value": 3.0, "at_edge": []}
    assert [r["value"] for r in found["runs"]] == [4.0, 3.0, None, 4.0]
    assert str(tmp_path) not in json.dumps(found)
    assert found["over_seeds"]["ours"] == {"seeds": 2, "mean": 3.5, "min": 3.0, "max": 4.0}
    assert found["over_seeds"]["theirs"] == {"seeds": 2, "mean": None, "min": None, "max": None}
    assert [(r["run"], r["seed"], r["steps"], r["value"]) for r in found["finals"]] == [
        *(("ours", 0, 9, 3.0), ("theirs", 0, 9, None), ("ours", 1, 9, 4.0), ("theirs", 1, 9, None)),
    ]
    assert (tmp_path / "results" / "name.png").stat().st_size > 1000
    assert (tmp_path / "results" / "name_ours.txt").read_text() == 'A "fine" place, seed 0.\n\n'
    assert not (tmp_path / "results" / "name_theirs.txt").exists()
    out = capsys.readouterr().out
    assert "best ours                 {'learning_rate': 0.01} 3.0000; 2 seeds: 3.5000 (3.0000 to 4.0000)\n" in out
    assert "best theirs               {'learning_rate': 1.0} inf; 2 seeds: diverged\n" in out

    made.clear()
    with pytest.raises(UserError, match="1 runs failed"):
        engine.main()
    assert made == ["theirs_0.5_seed0"]  # every record is there; only what failed is tried again
    assert [run.seed for run in finals(sweep, found["runs"])] == [0, 0, 1, 1]

    made.clear()
    shutil.rmtree(tmp_path / "out")  # another machine, where only the results are
    with pytest.raises(UserError, match="1 runs failed"):
        engine.main()
    assert made == ["theirs_0.5_seed0"]
    assert json.loads((tmp_path / "results" / "name.json").read_text())["runs"] == found["runs"]
    sweep.options["max_steps"] = 4  # a row made with other options does not count
    assert len(list(do(sweep, planned(sweep)))) == 5


OURS = ["ours_1e-3_seed0", "ours_1e-2_seed0", "ours_1e-1_seed0"]
THEIRS = ["theirs_0.5_seed0", "theirs_1.0_seed0"]


@pytest.mark.parametrize("outputs_stay", [True, False])
@pytest.mark.parametrize(
    "change", ["nothing", "base", "data", "default", "rule", "constant", "default of all", "Adam", "commit"]
)
def test_after_a_change_exactly_the_rows_concerned_are_made_again(tmp_path, made, monkeypatch, change, outputs_stay):
    sweep = read(tmp_path)
    list(do(sweep, planned(sweep)))
    report(sweep, "s.yaml")
    made.clear()
    if not outputs_stay:
        shutil.rmtree(tmp_path / "out")
    if change == "base":
        (tmp_path / "base.yaml").write_text((tmp_path / "base.yaml").read_text() + "warmup_fraction: 0.1\n")
    elif change == "data":
        (tmp_path / "text.txt").write_text("a tent")
    elif change == "default":

        class Other(SGDSaI):
            def __init__(self, params, lr=1e-3, momentum=0.8, scaling="adamw"):
                """The same optimizer with another default."""

        monkeypatch.setattr(optimizers, "SGDSaI", Other)
    elif change == "rule":
        monkeypatch.setattr(optimizers.calibration, "WINDOW", 61)
    elif change == "constant":
        monkeypatch.setitem(optimizers.FIXED["sgdm"], "momentum", 0.95)
    elif change == "default of all":
        monkeypatch.setattr(ModelArguments.__dataclass_fields__["dropout"], "default", 0.1)
    elif change == "Adam":  # neither has its betas
        monkeypatch.setattr(PretrainArguments.__dataclass_fields__["adam_beta2"], "default", 0.95)
    elif change == "commit":
        monkeypatch.setattr(provenance, "commit", lambda: ("d" * 40, True))
    list(do(sweep, planned(sweep)))
    again = {"default": OURS, "rule": OURS, "constant": THEIRS}
    again |= {key: [*OURS, *THEIRS] for key in ("base", "data", "default of all")}
    assert set(made) == {*again.get(change, []), "theirs_0.5_seed0"}, "that one fails and has no row"


def test_the_key_holds_every_default_that_decides(tmp_path, monkeypatch):
    sweep = read(tmp_path, runs={"Adam": {"options": {"optim": "adamw_torch_fused"}}, "ours": {}})
    before = [run.key for run in planned(sweep)[:2]]
    monkeypatch.setattr(PretrainArguments.__dataclass_fields__["adam_beta2"], "default", 0.95)
    after = [run.key for run in planned(sweep)[:2]]
    assert (before[0] == after[0], before[1] == after[1]) == (False, True)
    assert planned(sweep)[0].settings["optimizer"]["adam_beta2"] == 0.95
    monkeypatch.setattr(PretrainArguments.__dataclass_fields__["weight_decay"], "default", 0.5)
    assert [run.key for run in planned(sweep)[:2]] != after


def test_an_edited_row_is_an_error_that_names_it(tmp_path, made, monkeypatch):
    sweep = read(tmp_path)
    list(do(sweep, planned(sweep)))
    report(sweep, "s.yaml")
    path = tmp_path / "results" / "name.json"
    content = json.loads(path.read_text())
    assert finite(read_results(path)) == content
    content["best"]["ours"]["value"] = 1.0  # taken anew from the rows
    write_json(path, content)
    assert read_results(path)["best"]["ours"]["value"] == 3.0
    next(row for row in content["runs"] if row["point"] == {"learning_rate": 0.001})["value"] = 2.5
    write_json(path, content)
    edited = r"name.json: the row of 'ours' \(learning_rate 0.001, seed 0\) was edited: .* remove the row and run"
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml")])
    with pytest.raises(UserError, match=edited):
        engine.main()
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml"), "--report"])
    with pytest.raises(UserError, match=edited):
        engine.main()
    monkeypatch.setattr("sys.argv", ["report.py", str(path), "--output", str(tmp_path / "pareto.png")])
    with pytest.raises(UserError, match=edited):
        report_module.main()
    assert json.loads(path.read_text()) == content


def test_every_recorded_sweep_is_as_it_was_written():
    for path in (ROOT / "recipes" / "results").glob("*.json"):
        if "sweep" in json.loads(path.read_text(encoding="utf-8")):
            read_results(path)


def test_rows_of_several_origins_are_said_in_one_line_and_keep_theirs(tmp_path, made, monkeypatch, capsys):
    sweep = read(tmp_path)
    list(do(sweep, planned(sweep)[:1]))
    assert report(sweep, "s.yaml")["origins"] == ""
    record = next((tmp_path / "out").glob("*/record.json"))
    other = json.loads(record.read_text())
    other |= {"commit": "d" * 40, "clean": False, "device": "a GPU", "versions": other["versions"] | {"torch": "9.0"}}
    write_json(record, other | {"machine": other["machine"] | {"cores": 99}})
    report(sweep, "s.yaml")
    shutil.rmtree(tmp_path / "out")
    list(do(sweep, planned(sweep)))
    content = report(sweep, "s.yaml")
    torch = versions()["torch"]
    said = f"Rows of 2 commits (ccccccc, ddddddd with changes); torch {torch} and 9.0; 2 machines (a CPU, a GPU)."
    assert content["origins"] == said
    assert content["runs"][0]["machine"]["cores"] == 99 != content["runs"][1]["machine"]["cores"]
    assert "machine" not in content
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml"), "--report"])
    engine.main()
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_after_the_seconds_given_no_run_starts(tmp_path, made, monkeypatch, capsys):
    read(tmp_path, final={"seeds": [0]}, runs={"ours": {"options": {"optim": "sgd_sai"}}})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml"), "--seconds", "2.5"])
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the start of the sweep, then before each run
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
    engine.main()
    assert made == OURS[:2]
    out = capsys.readouterr().out
    assert "2.5 seconds are over; runs left: 1, and those at length; the same command does the rest\n" in out
    assert len(json.loads((tmp_path / "results" / "name.json").read_text())["runs"]) == 2
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seconds", "0"], r"--seconds must be above 0, got 0"), (["--processes", "0"], r"processes must be .* got 0")],
)
def test_options_of_the_command_are_checked(tmp_path, monkeypatch, words, message):
    read(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml"), *words])
    with pytest.raises(UserError, match=message):
        engine.main()


def test_seeds_of_the_best_do_not_repeat_the_run_of_the_grid(tmp_path, made, monkeypatch):
    read(tmp_path, final={"seeds": [0, 1]}, runs={"ours": {"options": {"optim": "sgd_sai"}}})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml")])
    engine.main()
    assert made == [*OURS, "ours_1e-2_seed1_final"]
    found = json.loads((tmp_path / "results" / "name.json").read_text())
    assert [(row["seed"], row["value"]) for row in found["finals"]] == [(0, 3.0), (1, 4.0)]


def test_data_that_changed_during_a_run_are_an_error(tmp_path, made):
    sweep = read(tmp_path)
    run = planned(sweep)[0]
    with pytest.raises(UserError, match=r"no run of s.yaml has ended yet"):
        report(sweep, "s.yaml")
    write_json(run.folder / "record.json", {"data_digests": {"train_files": "other"}})
    with pytest.raises(UserError, match=r"the data of .*ours_1e-3_seed0_\w{16} changed before it ended; remove it"):
        list(do(sweep, [run]))


def test_heat_map_and_pareto_figures_are_drawn(tmp_path, made):
    sweep = read(tmp_path, grid={"learning_rate": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]})
    list(do(sweep, planned(sweep)))
    content = report(sweep, "s.yaml")
    assert (tmp_path / "results" / "name.png").stat().st_size > 1000
    pareto([content, content], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_table_of_partitions():
    def own(run: str, rate: float, value: float, size: int) -> dict:
        return {**row(run, rate, value), "optimizer_state_bytes": size, "device": "a CPU"}

    runs = [own("head frozen", 1.0, 3.0, 51), own("head frozen", 2.0, 2.0, 51), own("head frozen", 4.0, 2.5, 51)]
    runs += [own("head running", 1.0, 2.25, 51), own("head running", 2.0, 4.0, 51), own("AdamW", 1.0, 2.5, 100)]
    finals = [own("head frozen", 2.0, value, 51) for value in (2.0, 2.5)]
    record = {
        "sweep": "partition_text.yaml",
        "metric": "eval_loss",
        "runs": runs,
        "best": best_points(runs, "eval_loss"),
        "over_seeds": report_module.over_seeds(finals),
    }
    text = tables.partitions(record)
    assert "|  | from scratch (GPT-2 0.3 M): frozen | running | state |" in text
    assert "| head | 2.250 (2.000 to 2.500) | 2.250* | 0.510 |" in text
    assert "| AdamW | 2.500 |  | 1.000 |" in text
    assert "mean and range of those seeds that have run" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recip": "x"}, r"unknown key 'recip'; did you mean 'recipe'"),
        ({"recipe": "gpt3"}, r"recipe must be one of pretrain, .* got 'gpt3'"),
        ({"processes": 0}, r"processes must be a whole number of at least 1, got 0"),
        ({"seeds": 3}, r"seeds must be a list of whole numbers, got 3"),
        ({"grid": {"learning_rate": 0.1}}, r"grid: learning_rate must be a list of values, got 0.1"),
        ({"runs": {"a": {"optim": "sgdm"}}}, r"runs: a must have `options`, `grid` and `seeds`, got unknown optim"),
        ({"runs": {"a": {"grid": {"lr": []}}}}, r"runs: a: grid: lr must be a list of values, got \[\]"),
        ({"final": {"seed": 1}}, r"final must have only options, seeds, texts, got"),
        ({"final": {"texts": ["mine"]}}, r"final: texts must name some of ours, theirs, got 'mine'"),
    ],
)
def test_sweep_file_is_checked(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **change)


SWEEPS = sorted((ROOT / "recipes" / "sweep" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_plans_runs_that_its_recipe_takes(path: Path, tmp_path: Path, monkeypatch):
    """Each run's options, of the grid and of the runs at length, pass the recipe's own checks."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("recipes.common.config.expand", lambda value: (value, None))  # the data need not be here
    sweep = Sweep.read(path)
    assert path.stem in sweep.results
    runs = planned(sweep)
    rows = [{"run": r.name, "point": r.point, "seed": r.seed, "value": 1.0} for r in runs]
    types = importlib.import_module(f"recipes.{sweep.recipe}.train").CONFIG_TYPES
    for run in [*runs, *finals(sweep, rows)]:
        parse_config(types, run.words(tmp_path))


def test_two_real_runs_in_a_process_of_their_own(tmp_path):
    """The same point twice under two names gives the same loss, and another seed another one."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the {i} quick brown foxes jump over {i * 7 % 13} lazy dogs" for i in range(9000)))
    base = {
        "train_files": [str(text)],
        "validation_fraction": 0.1,
        "tokenizer": "train",
        "vocab_size": 300,
        "model_size": "tiny",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 16,
        "block_size": 16,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    one = {"options": {"optim": "sgd_sai"}, "grid": {"learning_rate": [1e-3]}}
    sweep = read(tmp_path, base=str(tmp_path / "base.yaml"), runs={"a": one, "b": one}, options={}, seeds=[0, 1])
    assert [error for _, error in do(sweep, planned(sweep))] == [None] * 4
    rows = {(r["run"], r["seed"]): r for r in report(sweep, "s.yaml")["runs"]}
    assert rows["a", 0]["value"] == rows["b", 0]["value"] != rows["a", 1]["value"]
    row = rows["a", 1]
    groups = row["optimizer"]["groups"]
    assert row["optimizer"]["class"] == "hf_sai.optimizer.SGDSaI"
    assert {(g["lr"], g["momentum"], g["scaling"]) for g in groups} == {(1e-3, 0.9, "adamw")}
    assert sum(group["tensors"] for group in groups) == 16  # of a GPT-2 of one layer
    assert row["settings"]["base"]["vocab_size"] == 300
    assert row["settings"]["options"] == {"optim": "sgd_sai", "learning_rate": 1e-3, "seed": 1}
    digest = hashlib.sha256(text.read_bytes()).hexdigest()[:16]
    assert row["data_digests"] == {"train_files": digest, "tokenizer": "train"}
    assert len(row["tokenizer_digest"]) == 16
    assert row["device"] == row["machine"]["cpu"]
    assert row["machine"]["torch_threads"] == 1
    assert row["versions"] == versions()
    assert (row["commit"], row["clean"]) == provenance.commit()
    assert row["started"] <= row["finished"] <= provenance._now()
    assert all(len(row["load_average"][when]) == 3 for when in ("start", "end"))
    assert row["command"].endswith("--optim=sgd_sai --learning_rate=0.001 --seed=1")
    assert str(tmp_path) not in json.dumps(row)


KILLED = """
import multiprocessing, os, pathlib, sys, time

def work(path):
    from recipes.common.interrupt import worker_start
    worker_start()
    path.write_text(str(os.getpid()))
    time.sleep(900)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(pathlib.Path(sys.argv[1]),)).start()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_worker_ends_with_the_sweep_that_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    words, root = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "pid")], Path(__file__).parents[2]
    sweep = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(root)})
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    assert running(worker)
    sweep.kill()
    sweep.wait()
    until(lambda: not running(worker))


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def until(what: Callable[[], object], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
