"""The sweep: which runs it plans, what it takes for the best, that it goes on where it stopped, and real runs."""

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
from recipes import common, optimizers
from recipes import sweep as engine
from recipes.classifier import ClassifierArguments
from recipes.common import UserError, parse_config, write_json
from recipes.gpt2_lora_e2e import E2EArguments
from recipes.gpt2_pretrain import read_config
from recipes.image_data import ImageArguments
from recipes.image_models import ImageModelArguments
from recipes.lstm_text import LSTMArguments
from recipes.optimizers import RecipeArguments
from recipes.sweep import Sweep, best_points, do, finals, planned, report, row_of
from recipes.sweep_report import curves, larger_is_better, pareto, pareto_front


def content(folder: Path, **changes):
    return {
        "recipe": "gpt2_pretrain",
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
        (folder / "base.yaml").write_text("seed: 0\ntrain_files: [a/b.txt]\n")
    return Sweep.read(folder / "s.yaml")


def test_plan_takes_turns_between_optimizers_and_tells_each_run_its_options(tmp_path):
    sweep = read(tmp_path, seeds=[0, 1], grid={"learning_rate": [1e-3], "weight_decay": [0.0, 0.1]})
    runs = planned(sweep)
    assert [run.folder.name for run in runs] == [
        *("ours_0.001_0.0", "theirs_0.5_0.0", "ours_0.001_0.0_seed1", "theirs_0.5_0.0_seed1"),
        *("ours_0.001_0.1", "theirs_0.5_0.1", "ours_0.001_0.1_seed1", "theirs_0.5_0.1_seed1"),
        *("theirs_1.0_0.0", "theirs_1.0_0.0_seed1", "theirs_1.0_0.1", "theirs_1.0_0.1_seed1"),
    ]
    assert runs[0].options == {
        "max_steps": 3,
        "optim": "sgd_sai",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "seed": 0,
    }
    assert runs[0].words("base.yaml")[:3] == ["--config", "base.yaml", f"--output_dir={runs[0].folder}"]


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

    def stand_in(recipe, base, run):
        started.append(run.folder.name)
        write_json(run.folder / engine.SETTINGS, run.settings)
        rate = float(run.options["learning_rate"])
        if rate == 0.5:
            return "ValueError: no"
        loss = math.nan if rate >= 1 else 3 + abs(math.log10(rate) + 2) + run.seed
        record = {"final": {"eval_loss": loss}, "diverged": rate >= 1, "steps": run.options["max_steps"]}
        write_json(run.folder / "record.json", record | {"optimizer_state_bytes": 8, "speed": {"step_ms": 1.5}})
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
    return started


def test_sweep_goes_on_where_it_stopped_and_repeats_the_best_at_length(tmp_path, made, monkeypatch, capsys):
    sweep = read(tmp_path, final={"options": {"max_steps": 9}, "seeds": [0, 1], "records": True})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml")])
    with pytest.raises(UserError, match=r"1 runs failed, see run.log in .*: theirs_0.5"):
        engine.main()
    assert made == [
        *("ours_1e-3", "theirs_0.5", "ours_1e-2", "theirs_1.0", "ours_1e-1"),
        *("ours_1e-2_final", "ours_1e-2_seed1_final", "theirs_1.0_final", "theirs_1.0_seed1_final"),
    ]
    found = json.loads((tmp_path / "results" / "name.json").read_text())
    assert found["best"]["ours"] == {"point": {"learning_rate": 0.01}, "value": 3.0, "at_edge": []}
    assert [r["value"] for r in found["runs"]] == [4.0, 3.0, None, 4.0]
    assert found["base_options"] == {"seed": 0}  # and no path of this machine
    assert [(r["run"], r["seed"], r["steps"], r["value"]) for r in found["finals"]] == [
        *(("ours", 0, 9, 3.0), ("ours", 1, 9, 4.0), ("theirs", 0, 9, None), ("theirs", 1, 9, None)),
    ]
    assert (tmp_path / "results" / "name.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results" / "name_ours.json").read_text())["steps"] == 9
    assert "diverged" in capsys.readouterr().out

    made.clear()
    with pytest.raises(UserError, match="1 runs failed"):
        engine.main()
    assert made == ["theirs_0.5"]  # every record is there; only what failed is tried again
    assert [run.seed for run in finals(sweep, found["runs"])] == [0, 1, 0, 1]

    made.clear()
    shutil.rmtree(tmp_path / "out")  # another machine, where only the results are
    with pytest.raises(UserError, match="1 runs failed"):
        engine.main()
    assert made == ["theirs_0.5"]
    assert json.loads((tmp_path / "results" / "name.json").read_text())["runs"] == found["runs"]
    sweep.options["max_steps"] = 4  # a row made with other options does not count
    shutil.rmtree(tmp_path / "out")
    assert len(list(do(sweep, planned(sweep)))) == 5


@pytest.mark.parametrize("change", ["base", "default", "rule"])
def test_a_row_of_another_base_or_default_is_not_reused(tmp_path, made, monkeypatch, change):
    sweep = read(tmp_path)
    list(do(sweep, planned(sweep)))
    report(sweep, "s.yaml")
    made.clear()
    list(do(sweep, planned(sweep)))
    assert made == ["theirs_0.5"], "it failed; the others are there"
    made.clear()
    shutil.rmtree(tmp_path / "out")
    if change == "base":
        (tmp_path / "base.yaml").write_text("seed: 0\ntrain_files: [a/c.txt]\n")
    elif change == "default":

        class Other(SGDSaI):
            def __init__(self, params, lr=1e-3, momentum=0.8, scaling="adamw"):
                """The same optimizer with another default."""

        monkeypatch.setattr(optimizers, "SGDSaI", Other)
    else:
        monkeypatch.setattr(optimizers.calibration, "WINDOW", 61)
    list(do(sweep, planned(sweep)))
    ours = ["ours_1e-3", "ours_1e-2", "ours_1e-1"]
    everything = ["ours_1e-3", "theirs_0.5", "ours_1e-2", "theirs_1.0", "ours_1e-1"]
    assert made == everything if change == "base" else set(made) == {*ours, "theirs_0.5"}


def test_seeds_of_the_best_do_not_repeat_the_run_of_the_grid(tmp_path, made, monkeypatch):
    read(tmp_path, final={"seeds": [0, 1]}, runs={"ours": {"options": {"optim": "sgd_sai"}}})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "s.yaml")])
    engine.main()
    assert made == ["ours_1e-3", "ours_1e-2", "ours_1e-1", "ours_1e-2_seed1_final"]
    found = json.loads((tmp_path / "results" / "name.json").read_text())
    assert [(row["seed"], row["value"]) for row in found["finals"]] == [(0, 3.0), (1, 4.0)]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_with_other_settings_is_not_taken_over(tmp_path, made, finished):
    sweep = read(tmp_path)
    run = planned(sweep)[0]
    if finished:  # by a version that kept no settings
        write_json(run.folder / "record.json", {"final": {"eval_loss": 1.0}})
    else:
        write_json(run.folder / "sweep_settings.json", run.settings | {"recipe": "lstm_text"})
    with pytest.raises(UserError, match=r"ours_1e-3 holds a run with other settings; remove it"):
        list(do(sweep, [run]))
    assert row_of(run, "final.eval_loss") is None
    with pytest.raises(UserError, match=r"no run of s.yaml has ended yet"):
        report(sweep, "s.yaml")


def test_heat_map_and_pareto_figures_are_drawn(tmp_path, made):
    sweep = read(tmp_path, grid={"learning_rate": [1e-3, 1e-2], "weight_decay": [0.0, 0.1]})
    list(do(sweep, planned(sweep)))
    content = report(sweep, "s.yaml")
    assert (tmp_path / "results" / "name.png").stat().st_size > 1000
    pareto([content, content], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recip": "x"}, r"unknown key 'recip'; did you mean 'recipe'"),
        ({"recipe": "gpt3"}, r"recipe must be one of gpt2_pretrain, .* got 'gpt3'"),
        ({"processes": 0}, r"processes must be a whole number of at least 1, got 0"),
        ({"seeds": 3}, r"seeds must be a list of whole numbers, got 3"),
        ({"grid": {"learning_rate": 0.1}}, r"grid: learning_rate must be a list of values, got 0.1"),
        ({"runs": {"a": {"optim": "sgdm"}}}, r"runs: a must have `options` and `grid`, got unknown optim"),
        ({"runs": {"a": {"grid": {"lr": []}}}}, r"runs: a: grid: lr must be a list of values, got \[\]"),
        ({"final": {"seed": 1}}, r"final must have only options, records, seeds, got"),
    ],
)
def test_sweep_file_is_checked(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **change)


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
SWEEPS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\nruns:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_plans_runs_that_its_recipe_takes(path: Path, tmp_path: Path, monkeypatch):
    """Each run's options, of the grid and of the runs at length, pass the recipe's own checks."""
    monkeypatch.chdir(CONFIGS.parents[1])
    monkeypatch.setattr(common, "expand", lambda value: (value, None))  # the data need not be here
    sweep = Sweep.read(path)
    assert path.stem in sweep.results
    runs = planned(sweep)
    rows = [{"run": r.name, "point": r.point, "seed": r.seed, "value": 1.0} for r in runs]
    for run in [*runs, *finals(sweep, rows)]:
        run.folder = tmp_path / run.folder.name
        words = run.words(sweep.base)
        if sweep.recipe == "gpt2_pretrain":
            read_config(words)
        elif sweep.recipe == "gpt2_lora_e2e":
            parse_config([E2EArguments, RecipeArguments], words)
        elif sweep.recipe == "lstm_text":
            parse_config([LSTMArguments, ClassifierArguments], words)
        else:
            parse_config([ImageArguments, ImageModelArguments, ClassifierArguments], words)


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
    values = {(r["run"], r["seed"]): r["value"] for r in report(sweep, "s.yaml")["runs"]}
    assert values["a", 0] == values["b", 0] != values["a", 1]


KILLED = """
import multiprocessing, os, pathlib, sys, time

def work(path):
    from recipes.interrupt import worker_start
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
