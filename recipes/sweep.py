"""A grid of runs, then the best of each at length: `python -m recipes.sweep FILE.yaml [--report]`.

The file names a recipe (`recipe`), its configuration (`base`), options that all runs share (`options`), the grid
(`grid`: option -> values) and the optimizers (`runs`: name -> their `options`, and a `grid` of their own where the
shared one does not fit, as with other units). Every combination is one run, with each of `seeds`. `final` repeats the
best point of each optimizer with other options and seeds. Several processes work at once, each imports the recipe once
and does many runs.

A killed sweep resumes: a run whose record is in `output`, or whose row is in the results already (made on another
machine, perhaps), is not repeated. A row counts only for the same base configuration, the same options and the same
meaning of `optim`: a changed default of SGD-SaI makes all its runs new ones. The rows go to `results`.json (one a run)
with a figure beside it; `--report` writes both from the runs that have ended.
"""

from __future__ import annotations

from recipes.start import run_main

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import statistics
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.common import UserError, did_you_mean, machine, read_yaml, versions, write_json
from recipes.interrupt import resumable, worker_start
from recipes.optimizers import meaning
from recipes.sweep_report import draw, larger_is_better

# By the recipe's name: its module, the function there that takes command-line words, and where in its record the figure
# is that decides.
RECIPES: dict[str, tuple[str, str, str]] = {
    "gpt2_pretrain": ("recipes.gpt2_pretrain", "pretrain", "final.eval_loss"),
    "gpt2_lora_e2e": ("recipes.gpt2_lora_e2e", "run_words", "eval_loss"),
    "image_classification": ("recipes.image_classification", "run", "final.eval_top1"),
    "lstm_text": ("recipes.lstm_text", "run", "final.eval_loss"),
}
_FINAL = {"options", "seeds", "records"}
# In a run's folder: the settings it was started with.
SETTINGS = "sweep_settings.json"


@dataclass
class Sweep:
    """The contents of a sweep's file.

    Attributes:
        final: `options` and `seeds` of the runs at length, and with `records: true` their whole records, first seed
            only, go to the results too, for `compare.py`.
        metric: where in a run's record the figure is that decides, with dots; the recipe's own by default. Names that
            end in `accuracy`, `top1` or `top5` are better when larger, all others when smaller.
    """

    recipe: str
    base: str
    runs: dict[str, dict[str, Any]]
    output: str
    results: str
    grid: dict[str, list[Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    final: dict[str, Any] | None = None
    metric: str = ""
    processes: int = 1

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        content = read_yaml(path)
        known = list(cls.__dataclass_fields__)
        for key in content:
            if key not in known:
                raise UserError(f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}")
        if missing := [key for key in ("recipe", "base", "runs", "output", "results") if key not in content]:
            raise UserError(f"{path} lacks {', '.join(missing)}")
        sweep = cls(**content)
        sweep.check(str(path))
        sweep.metric = sweep.metric or RECIPES[sweep.recipe][2]
        return sweep

    def check(self, path: str) -> None:
        if not isinstance(self.recipe, str) or self.recipe not in RECIPES:
            raise UserError(f"{path}: recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if not isinstance(self.processes, int) or self.processes < 1:
            raise UserError(f"{path}: processes must be a whole number of at least 1, got {self.processes!r}")
        for name in ("runs", "grid", "options"):
            if not isinstance(value := getattr(self, name), dict):
                raise UserError(f"{path}: {name} must be `key: value` lines, got {value!r}")
        if not isinstance(self.seeds, list) or not self.seeds:
            raise UserError(f"{path}: seeds must be a list of whole numbers, got {self.seeds!r}")
        for name, run in self.runs.items():
            if not isinstance(run, dict) or (unknown := set(run) - {"options", "grid"}):
                what = f"unknown {', '.join(sorted(unknown))}" if isinstance(run, dict) else repr(run)
                raise UserError(f"{path}: runs: {name} must have `options` and `grid`, got {what}")
        for where, grid in [("grid", self.grid), *((f"runs: {k}: grid", r.get("grid")) for k, r in self.runs.items())]:
            for option, values in (grid or {}).items():
                if not isinstance(values, list) or not values:
                    raise UserError(f"{path}: {where}: {option} must be a list of values, got {values!r}")
        if self.final is not None and (not isinstance(self.final, dict) or set(self.final) - _FINAL):
            raise UserError(f"{path}: final must have only {', '.join(sorted(_FINAL))}, got {self.final!r}")


@dataclass
class Run:
    """One run: a point of an optimizer's grid and a seed."""

    name: str
    point: dict[str, Any]
    seed: int
    folder: Path
    options: dict[str, Any]  # besides the base configuration
    settings: dict[str, Any]  # the recipe, the base configuration, the options and what they mean for the optimizer

    @property
    def digest(self) -> str:
        """Of its settings: a row of the results counts for a run only if it was made with the same ones."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    def holds_other_settings(self) -> bool:
        """Whether the folder has a run, finished or not, that was started with other settings."""
        path = self.folder / SETTINGS
        if path.exists():
            return bool(json.loads(path.read_text(encoding="utf-8")) != self.settings)
        return (self.folder / "record.json").exists()

    def words(self, base: str) -> list[str]:
        words = ["--config", base, f"--output_dir={self.folder}"]
        for key, value in self.options.items():
            if isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            else:
                words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return words


def planned(sweep: Sweep) -> list[Run]:
    """Every run of the grid: the first points of all optimizers come first, so that a cut sweep treats all alike."""
    by_name: list[list[Run]] = []
    for name, run in sweep.runs.items():
        grid = {**sweep.grid, **(run.get("grid") or {})}
        found = []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            for seed in sweep.seeds:
                found.append(_run(sweep, name, point, seed, {}, ""))
        by_name.append(found)
    return [run for row in itertools.zip_longest(*by_name) for run in row if run is not None]


def _run(sweep: Sweep, name: str, point: dict[str, Any], seed: int, more: Mapping[str, Any], suffix: str) -> Run:
    options = {**sweep.options, **(sweep.runs[name].get("options") or {}), **point, **more, "seed": seed}
    parts = [name, *(str(value) for value in point.values()), *([f"seed{seed}"] if seed != sweep.seeds[0] else [])]
    folder = "_".join(part.replace("/", "-") for part in parts) + suffix
    base = read_yaml(sweep.base)
    chosen = base | options
    optimizer = meaning(chosen.get("optim", "sgd_sai"), chosen.get("optim_args"))
    settings = _plain({"recipe": sweep.recipe, "base": base, "options": options, "optimizer": optimizer})
    return Run(name, point, seed, Path(sweep.output) / folder, options, settings)


def finals(sweep: Sweep, rows: list[dict[str, Any]]) -> list[Run]:
    """The runs at length: the best point of each optimizer, every seed of `final`."""
    if sweep.final is None:
        return []
    more, seeds = sweep.final.get("options") or {}, sweep.final.get("seeds") or sweep.seeds
    best = best_points(rows, sweep.metric)
    # As the file writes it: a run of the grid that has the same options and seed is not done again.
    points = {
        name: next(
            r.point for r in planned(sweep) if r.name == name and _numbers(r.point) == _numbers(best[name]["point"])
        )
        for name in best
    }
    return [_run(sweep, name, points[name], seed, more, "_final") for name in best for seed in seeds]


def best_points(rows: list[dict[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """Of each optimizer the point with the best mean over its seeds: name -> point, value, at_edge (the axes at whose
    end it lies, where a better one may lie outside)."""
    best: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["run"] for row in rows):
        points: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["run"] == name:
                points.setdefault(json.dumps(row["point"], sort_keys=True), []).append(row)
        worst = -math.inf if larger_is_better(metric) else math.inf
        means = {
            key: statistics.fmean(row["value"] if row["value"] is not None else worst for row in group)
            for key, group in points.items()
        }
        chosen = (max if larger_is_better(metric) else min)(means, key=lambda key: means[key])
        point = points[chosen][0]["point"]
        axes = {axis: sorted({float(r["point"][axis]) for r in rows if r["run"] == name}) for axis in point}
        edge = [a for a, v in axes.items() if len(v) > 2 and float(point[a]) in (v[0], v[-1])]
        best[name] = {"point": point, "value": means[chosen], "at_edge": edge}
    return best


# --- doing the runs --------------------------------------------------------------------------------------------------


def _start_worker() -> None:
    worker_start()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def perform(recipe: str, base: str, run: Run) -> str | None:
    """Do one run in this process, its output in `run.log`; returns an error's text, None where there was none."""
    write_json(run.folder / SETTINGS, run.settings)
    try:
        module, function, _ = RECIPES[recipe]
        train = getattr(importlib.import_module(module), function)
        with (
            open(run.folder / "run.log", "a", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                unfinished = any(run.folder.glob("checkpoint-*"))
                train([*run.words(base), *(["--resume_from_checkpoint=auto"] if unfinished else [])])
            except Exception:
                traceback.print_exc()
                raise
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def row_of(run: Run, metric: str, earlier: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """A finished run as a row of the results: from its record, or from `earlier` results; None if it is in neither."""
    path = run.folder / "record.json"
    if not path.exists() or run.holds_other_settings():
        return (earlier or {}).get(run.digest)
    record = json.loads(path.read_text(encoding="utf-8"))
    value: Any = record
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    value = float(value) if value is not None else math.nan
    finite = math.isfinite(value) and not record.get("diverged", False)
    speed = record.get("speed") or record.get("time") or {}
    return {
        "run": run.name,
        "point": _numbers(run.point),
        "seed": run.seed,
        "value": value if finite else None,  # None: diverged
        **({"scores": record["scores"]} if record.get("scores") else {}),
        "steps": record.get("steps"),
        "optimizer_state_bytes": record.get("optimizer_state_bytes"),
        "step_ms": speed.get("step_ms"),
        "optimizer_ms": speed.get("optimizer_ms"),
        "finished": record.get("finished"),
        "cpu": (record.get("machine") or {}).get("cpu"),
        "digest": run.digest,
    }


def _numbers(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if _is_number(value) else value for key, value in point.items()}


def earlier_rows(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The rows of the results file as it is, by their digest."""
    path = Path(sweep.results).with_suffix(".json")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {row["digest"]: row for row in [*content["runs"], *content["finals"]]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"results: {path} is not what this sweep wrote ({error!r}); remove it or name another"
        ) from error


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def do(sweep: Sweep, runs: list[Run]) -> Iterator[tuple[Run, str | None]]:
    """Do the runs that have no record yet; yields each as it ends, with its error if it failed."""
    earlier = earlier_rows(sweep)
    left = [run for run in runs if row_of(run, sweep.metric, earlier) is None]
    for run in left:
        if run.holds_other_settings():
            raise UserError(f"output: {run.folder} holds a run with other settings; remove it or give another output")
    if not left:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    with ProcessPoolExecutor(min(sweep.processes, len(left)), context, _start_worker) as pool:
        tasks = {pool.submit(perform, sweep.recipe, sweep.base, run): run for run in left}
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BaseException:  # Ctrl-C: runs that are not done yet are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _plain(settings: dict[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def report(sweep: Sweep, file: str) -> dict[str, Any]:
    """Write the rows that are there, the best points and the figure."""
    earlier = earlier_rows(sweep)
    grid = [row for run in planned(sweep) if (row := row_of(run, sweep.metric, earlier))]
    if not grid:
        raise UserError(f"no run of {file} has ended yet: start the sweep without --report")
    runs = finals(sweep, grid)
    content = {
        "sweep": Path(file).name,
        "command": f"python -m recipes.sweep recipes/configs/{Path(file).name}",
        "recipe": sweep.recipe,
        "base": Path(sweep.base).name,
        "base_options": {k: v for k, v in read_yaml(sweep.base).items() if not _is_path(v)},
        "options": {k: v for k, v in sweep.options.items() if not _is_path(v)},
        "metric": sweep.metric,
        "planned": len(planned(sweep)),
        "best": best_points(grid, sweep.metric),
        "runs": grid,
        "finals": [row for run in runs if (row := row_of(run, sweep.metric, earlier))],
        "final_options": (sweep.final or {}).get("options") or {},
        "machine": machine(),
        "versions": versions(),
    }
    results = Path(sweep.results)
    for run in runs:
        if (sweep.final or {}).get("records") and run.seed == runs[0].seed and (run.folder / "record.json").exists():
            whole = json.loads((run.folder / "record.json").read_text(encoding="utf-8"))
            write_json(results.with_name(f"{results.name}_{run.name}.json"), whole)
    write_json(results.with_suffix(".json"), content)
    draw(content, results.with_suffix(".png"))
    return content


def _is_path(value: Any) -> bool:
    return isinstance(value, str | list) and "/" in str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.yaml")
    parser.add_argument("--report", action="store_true", help="only write the results of the runs that are there")
    parser.add_argument("--processes", type=int, help="instead of the file's")
    args = parser.parse_args()
    sweep = Sweep.read(args.file)
    sweep.processes = args.processes or sweep.processes
    sweep.check(args.file)
    with resumable(lambda: ""):
        _work(sweep, args)


def _work(sweep: Sweep, args: argparse.Namespace) -> None:
    failed: list[str] = []
    for stage in ("grid", "final") if not args.report else ():
        runs = planned(sweep)
        if stage == "final":
            earlier = earlier_rows(sweep)
            runs = finals(sweep, [row for run in runs if (row := row_of(run, sweep.metric, earlier))])
        for run, error in do(sweep, runs):
            row = row_of(run, sweep.metric)
            value = "failed" if row is None else "diverged" if row["value"] is None else f"{row['value']:.4f}"
            print(f"{run.folder.name:40} {sweep.metric} {value}{f' ({error})' if error else ''}", flush=True)
            if error:
                failed.append(run.folder.name)
            else:
                report(sweep, args.file)
    content = report(sweep, args.file)
    for name, best in content["best"].items():
        edge = f", at the edge of {', '.join(best['at_edge'])}" if best["at_edge"] else ""
        print(f"best {name:20} {best['point']} {best['value']:.4f}{edge}")
    if failed:
        raise UserError(f"{len(failed)} runs failed, see run.log in {sweep.output}: {', '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
