"""A grid of runs, then the best of each at length: `python -m recipes.sweep FILE.yaml [--report]`.

The file names a recipe (`recipe`), its configuration (`base`), options that all runs share (`options`), the grid
(`grid`: option -> values) and the optimizers (`runs`: name -> their `options`, and a `grid` of their own where the
shared one does not fit, as with other units). Every combination is one run, with each of `seeds`. `final` repeats the
best point of each optimizer with other options and seeds. Several processes work at once, each imports the recipe once
and does many runs.

A killed sweep resumes: a run whose record is in `output`, or whose row is in the results already (made on another
machine, perhaps), is not repeated. A row counts only for the same recipe, base configuration, options, defaults,
optimizer and content of the data; the commit and the versions are in the row (`provenance.py`). The rows go to
`results`.json (one a run) with a figure beside it; `--report` writes both from the runs that have ended.

Without `use_cpu` all processes share one GPU, the first that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.common.config import find_config, read_yaml
from recipes.common.errors import UserError, did_you_mean
from recipes.common.files import write_json, write_text
from recipes.common.interrupt import resumable, worker_start
from recipes.common.optimizers import ADAM, meaning
from recipes.common.provenance import DATA, ORIGIN, PLACES, data_digests, defaults, digest, origins, plain, sealed
from recipes.common.records import without_folders
from recipes.sweep.report import best_points, draw, over_seeds, read_results, show

# The jobs, and where in the record of one the figure is that decides.
JOBS = {"pretrain": "final.eval_loss", "e2e": "eval_loss", "images": "final.eval_top1", "lstm": "final.eval_loss"}
_FINAL = {"options", "seeds", "texts"}


@dataclass
class Sweep:
    """The contents of a sweep's file.

    Attributes:
        runs: name -> `options`, `grid`, and the `seeds` of its runs at length where these are not those of `final`.
        final: `options` and `seeds` of the runs at length. Of the optimizers in `texts` the generated texts of the
            first seed go beside the results, one a line, as `hf-sai score` reads them.
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
        sweep.metric = sweep.metric or JOBS[sweep.recipe]
        return sweep

    def check(self, path: str) -> None:
        if not isinstance(self.recipe, str) or self.recipe not in JOBS:
            raise UserError(f"{path}: recipe must be one of {', '.join(JOBS)}, got {self.recipe!r}")
        if not isinstance(self.processes, int) or self.processes < 1:
            raise UserError(f"{path}: processes must be a whole number of at least 1, got {self.processes!r}")
        for name in ("runs", "grid", "options"):
            if not isinstance(value := getattr(self, name), dict):
                raise UserError(f"{path}: {name} must be `key: value` lines, got {value!r}")
        if not isinstance(self.seeds, list) or not self.seeds:
            raise UserError(f"{path}: seeds must be a list of whole numbers, got {self.seeds!r}")
        for name, run in self.runs.items():
            if not isinstance(run, dict) or (unknown := set(run) - {"options", "grid", "seeds"}):
                what = f"unknown {', '.join(sorted(unknown))}" if isinstance(run, dict) else repr(run)
                raise UserError(f"{path}: runs: {name} must have `options`, `grid` and `seeds`, got {what}")
        for where, grid in [("grid", self.grid), *((f"runs: {k}: grid", r.get("grid")) for k, r in self.runs.items())]:
            for option, values in (grid or {}).items():
                if not isinstance(values, list) or not values:
                    raise UserError(f"{path}: {where}: {option} must be a list of values, got {values!r}")
        if self.final is not None and (not isinstance(self.final, dict) or set(self.final) - _FINAL):
            raise UserError(f"{path}: final must have only {', '.join(sorted(_FINAL))}, got {self.final!r}")
        for name in (self.final or {}).get("texts") or ():
            if name not in self.runs:
                raise UserError(f"{path}: final: texts must name some of {', '.join(self.runs)}, got {name!r}")


@dataclass
class Run:
    """One run: a point of an optimizer's grid and a seed."""

    recipe: str
    base: str
    output: Path
    name: str
    point: dict[str, Any]
    seed: int
    options: dict[str, Any]  # besides the base configuration
    at_length: bool = False

    @property
    def label(self) -> str:
        parts = [self.name, *(str(value) for value in self.point.values())]
        parts += [f"seed{self.seed}", *(["final"] if self.at_length else [])]
        return "_".join(part.replace("/", "-") for part in parts)

    @property
    def folder(self) -> Path:
        """Runs with other settings have other folders: nothing is taken over or overwritten."""
        return self.output / f"{self.label}_{self.key}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result, of data the content and no place: a row counts for a run with the same ones."""
        file = find_config(self.base)
        base = _base(self.base, file.stat().st_mtime_ns if file.exists() else 0)
        given = base | self.options
        types = _job(self.recipe).CONFIG_TYPES
        chosen = defaults(types) | given
        rest = {k: v for k, v in chosen.items() if k not in {*given, *ADAM}}  # those of Adam: `meaning`
        parts = {"base": base, "options": self.options, "defaults": rest}
        kept = {name: {k: v for k, v in part.items() if k not in {*PLACES, *DATA}} for name, part in parts.items()}
        return plain({"recipe": self.recipe, **kept, "optimizer": meaning(chosen), "data": data_digests(chosen)})

    @property
    def key(self) -> str:
        return digest(self.settings)

    def words(self, folder: Path) -> list[str]:
        """The recipe's command line."""
        return ["--config", self.base, f"--output_dir={folder}", *_words(self.options)]

    @property
    def command(self) -> str:
        """The command that makes this run alone, in the recipe's own output folder."""
        words = ["python", "-m", f"recipes.{self.recipe}", Path(self.base).name]
        return shlex.join([*words, *_words(without_folders(self.options))])


@functools.lru_cache(maxsize=1)
def _base(path: str, changed: int) -> dict[str, Any]:
    """A base configuration; read once for all runs of a sweep unless it changes."""
    return read_yaml(path)


def _job(name: str) -> Any:
    return importlib.import_module(f"recipes.{name}.train")


def _words(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in options.items():
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
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        by_name.append([_run(sweep, name, point, seed) for point in points for seed in sweep.seeds])
    return [run for row in itertools.zip_longest(*by_name) for run in row if run is not None]


def _run(sweep: Sweep, name: str, point: dict[str, Any], seed: int, more: Mapping[str, Any] | None = None) -> Run:
    own = sweep.runs[name].get("options") or {}
    options = {**sweep.options, **own, **point, **(more or {}), "seed": seed}
    return Run(sweep.recipe, sweep.base, Path(sweep.output), name, point, seed, options, more is not None)


def finals(sweep: Sweep, rows: list[dict[str, Any]]) -> list[Run]:
    """The runs at length: the best point of each optimizer with its seeds, the first seed of all of them first."""
    if sweep.final is None:
        return []
    more = sweep.final.get("options") or {}
    best = best_points(rows, sweep.metric)
    # As the file writes it: a run of the grid that has the same options and seed is not done again.
    points = {
        name: next(
            r.point for r in planned(sweep) if r.name == name and _numbers(r.point) == _numbers(best[name]["point"])
        )
        for name in best
    }
    shared = sweep.final.get("seeds") or sweep.seeds
    by_name = [
        [_run(sweep, name, points[name], seed, more) for seed in sweep.runs[name].get("seeds") or shared]
        for name in best
    ]
    return [run for row in itertools.zip_longest(*by_name) for run in row if run is not None]


# --- doing the runs --------------------------------------------------------------------------------------------------


def _start_worker() -> None:
    worker_start()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def perform(run: Run) -> str | None:
    """Do one run in this process, its output in `run.log`; returns an error's text, None where there was none."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_initialized():  # by an earlier run: its memory goes back to the other processes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        train = _job(run.recipe).run
        with (
            open(run.folder / "run.log", "a", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                unfinished = any(run.folder.glob("checkpoint-*"))
                train([*run.words(run.folder), *(["--resume_from_checkpoint=auto"] if unfinished else [])])
            except Exception:
                traceback.print_exc()
                raise
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def row_of(
    run: Run, metric: str, earlier: Mapping[tuple[str, str], dict[str, Any]] | None = None
) -> dict[str, Any] | None:
    """A finished run as a row of the results: from its record, or from `earlier` results; None if it is in neither."""
    path = run.folder / "record.json"
    if not path.exists():
        return (earlier or {}).get((run.name, run.key))
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["data_digests"] != run.settings["data"]:
        raise UserError(f"output: the data of {run.folder} changed before it ended; remove it and run the sweep again")
    value: Any = record
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    value = float(value) if value is not None else math.nan
    finite = math.isfinite(value) and not record.get("diverged", False)
    speed = record.get("speed") or record.get("time") or {}
    row = {
        "run": run.name,
        "point": _numbers(run.point),
        "seed": run.seed,
        "value": value if finite else None,  # None: diverged
        **({"scores": record["scores"]} if record.get("scores") else {}),
        "steps": record.get("steps"),
        "optimizer_state_bytes": record.get("optimizer_state_bytes"),
        "step_ms": speed.get("step_ms"),
        "optimizer_ms": speed.get("optimizer_ms"),
        "key": run.key,
        "settings": run.settings,
        "command": run.command,
        **{name: record.get(name) for name in ORIGIN},
    }
    return sealed(row)


def _numbers(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if _is_number(value) else value for key, value in point.items()}


def earlier_rows(sweep: Sweep) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the results file as it is, by their run's name and the key of its settings."""
    path = Path(sweep.results).with_suffix(".json")
    if not path.exists():
        return {}
    content = read_results(path)
    return {(row["run"], row["key"]): row for row in [*content["runs"], *content["finals"]]}


def _rows(sweep: Sweep, runs: list[Run]) -> list[dict[str, Any]]:
    """Of the runs that have ended, here or in the results."""
    earlier = earlier_rows(sweep)
    return [row for run in runs if (row := row_of(run, sweep.metric, earlier))]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def do(sweep: Sweep, runs: list[Run], until: float = math.inf) -> Iterator[tuple[Run, str | None]]:
    """Do the runs that have no record yet; yields each as it ends, with its error if it failed.

    Args:
        sweep: the file.
        runs: in their order.
        until: none starts after this, in seconds of `time.monotonic`.
    """
    earlier = earlier_rows(sweep)
    left = [run for run in runs if row_of(run, sweep.metric, earlier) is None]
    if not left:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    processes = min(sweep.processes, len(left))
    with ProcessPoolExecutor(processes, context, _start_worker) as pool:
        tasks: dict[Future[str | None], Run] = {}

        def start() -> None:
            while left and len(tasks) < processes and time.monotonic() < until:
                run = left.pop(0)
                tasks[pool.submit(perform, run)] = run

        try:
            start()
            while tasks:
                ended = [(tasks.pop(task), task.result()) for task in wait(tasks, return_when=FIRST_COMPLETED).done]
                start()
                yield from ended
        except BaseException:  # Ctrl-C: runs that are not done yet are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def report(sweep: Sweep, file: str) -> dict[str, Any]:
    """Write the rows that are there, the best points and the figure."""
    grid = _rows(sweep, planned(sweep))
    if not grid:
        raise UserError(f"no run of {file} has ended yet: start the sweep without --report")
    runs = finals(sweep, grid)
    at_length = _rows(sweep, runs)
    content = {
        "sweep": Path(file).name,
        "command": f"python -m recipes.sweep {Path(file).name}",
        "recipe": sweep.recipe,
        "base": Path(sweep.base).name,
        "metric": sweep.metric,
        "planned": len(planned(sweep)),
        "origins": origins([*grid, *at_length]),
        "best": best_points(grid, sweep.metric),
        "over_seeds": over_seeds(at_length),
        "runs": grid,
        "finals": at_length,
        "final_options": (sweep.final or {}).get("options") or {},
    }
    results = Path(sweep.results)
    for name in (sweep.final or {}).get("texts") or ():
        first = next((run for run in runs if run.name == name), None)
        if first is not None and (first.folder / "predictions.tsv").exists():
            with open(first.folder / "predictions.tsv", encoding="utf-8", newline="") as predictions:
                texts = [row["output"] for row in csv.DictReader(predictions, delimiter="\t")]
            path = results.with_name(f"{results.name}_{name.replace(' ', '_')}.txt")
            write_text(path, "".join(f"{text}\n" for text in texts))
    write_json(results.with_suffix(".json"), content)
    draw(content, results.with_suffix(".png"))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.yaml")
    parser.add_argument("--report", action="store_true", help="only write the results of the runs that are there")
    parser.add_argument("--processes", type=int, help="instead of the file's")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no run after N seconds; by default no limit"
    )
    args = parser.parse_args()
    if not args.seconds > 0:
        raise UserError(f"--seconds must be above 0, got {args.seconds:g}")
    sweep = Sweep.read(args.file)
    sweep.processes = sweep.processes if args.processes is None else args.processes
    sweep.check(args.file)
    # Workers inherit it: the Trainer would split every batch over all GPUs that it sees.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with resumable(lambda: ""):
        _work(sweep, args)


def _work(sweep: Sweep, args: argparse.Namespace) -> None:
    until, failed = time.monotonic() + args.seconds, set()
    for stage in ("grid", "final") if not args.report else ():
        runs = planned(sweep)
        if stage == "final":
            runs = finals(sweep, _rows(sweep, runs))
        for run, error in do(sweep, runs, until):
            row = row_of(run, sweep.metric)
            value = "failed" if row is None else "diverged" if row["value"] is None else f"{row['value']:.4f}"
            print(f"{run.label:40} {sweep.metric} {value}{f' ({error})' if error else ''}", flush=True)
            if error:
                failed.add(run.label)
            else:
                report(sweep, args.file)
        earlier = earlier_rows(sweep)
        left = [run for run in runs if run.label not in failed and row_of(run, sweep.metric, earlier) is None]
        if left:
            more = ", and those at length" if stage == "grid" and sweep.final else ""
            print(f"{args.seconds:g} seconds are over; runs left: {len(left)}{more}; the same command does the rest")
            break
    if args.report or _rows(sweep, planned(sweep)):
        show(report(sweep, args.file))
    if failed:
        raise UserError(f"{len(failed)} runs failed, see run.log in {sweep.output}: {', '.join(sorted(failed))}")
