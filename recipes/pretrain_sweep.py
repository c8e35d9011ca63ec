"""A grid of short runs, then the best of each optimizer for longer: `python recipes/pretrain_sweep.py FILE.yaml`.

The file names a configuration of `gpt2_pretrain.py` (`base`), options that all runs share (`options`), the length of
the short and the long runs in tokens (`tokens`, `final_tokens`), and the optimizers (`runs`), each with its options
and `learning_rates`. Every run is a process of its own. A killed sweep goes on where it stopped; a run whose record
is there is not repeated. What it found goes to `results`: the sweep's losses, the long runs' records.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common import UserError, did_you_mean, machine, read_yaml, run_main, versions, write_json
from recipes.compare import compare

RECIPE = Path(__file__).with_name("gpt2_pretrain.py")
_KINDS = {dict: "`key: value` lines", int: "a whole number of at least 1"}


@dataclass
class Sweep:
    """The contents of a sweep's file."""

    base: str
    runs: dict[str, dict[str, Any]]
    tokens: int
    final_tokens: int
    output: str
    results: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        content = read_yaml(path)
        known = list(cls.__dataclass_fields__)
        for key in content:
            if key not in known:
                raise UserError(f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}")
        if missing := [key for key in known if key != "options" and key not in content]:
            raise UserError(f"{path} lacks {', '.join(missing)}")
        sweep = cls(**content)
        for name, kind in (("runs", dict), ("options", dict), ("tokens", int), ("final_tokens", int)):
            if not isinstance(value := getattr(sweep, name), kind) or (kind is int and value < 1):
                raise UserError(f"{path}: {name} must be {_KINDS[kind]}, got {value!r}")
        for name, run in sweep.runs.items():
            rates = run.get("learning_rates") if isinstance(run, dict) else None
            if not isinstance(rates, list) or not rates:
                raise UserError(f"{path}: runs: {name} must list learning_rates")
        return sweep


def run(sweep: Sweep, folder: Path, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """One pretraining run in a process of its own; its record, read back where it was already there."""
    record = folder / "record.json"
    if not record.exists():
        options = {
            **sweep.options,
            **options,
            "max_tokens": tokens,
            "output_dir": folder,
            "resume_from_checkpoint": "auto",
            "disable_tqdm": "true",
        }
        words = [f"--{key}={value}" for key, value in options.items()]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "run.log", "a") as log:
            subprocess.run([sys.executable, str(RECIPE), sweep.base, *words], check=True, stdout=log, stderr=log)
    return json.loads(record.read_text(encoding="utf-8"))


def loss_of(record: dict[str, Any]) -> float:
    """The final validation loss; infinite where the run diverged, so that it is never the best."""
    loss = float(record["final"]["eval_loss"])
    return math.inf if record["diverged"] or not math.isfinite(loss) else loss


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python recipes/pretrain_sweep.py FILE.yaml")
    sweep = Sweep.read(sys.argv[1])
    output, results = Path(sweep.output), Path(sweep.results)
    table: list[dict[str, Any]] = []
    best: dict[str, tuple[float, Any]] = {}
    for name, settings in sweep.runs.items():
        options = {key: value for key, value in settings.items() if key != "learning_rates"}
        for rate in settings["learning_rates"]:
            record = run(sweep, output / f"{name}_{rate}", sweep.tokens, {**options, "learning_rate": rate})
            loss = loss_of(record)
            table.append(
                {"run": name, "learning_rate": float(rate), "eval_loss": loss, "diverged": record["diverged"]}
                | {"tokens": record["tokens"], "train_seconds": record["train_seconds"]}
            )
            print(f"{name:16} lr {rate:<8} validation loss {loss:.4f}", flush=True)
            if name not in best or loss < best[name][0]:
                best[name] = (loss, rate)
            write_json(
                results.with_name(f"{results.name}_sweep.json"),
                {"base": Path(sweep.base).name, "runs": table, "machine": machine(), "versions": versions()},
            )
    finals = []
    for name, (_, rate) in best.items():
        options = {key: value for key, value in sweep.runs[name].items() if key != "learning_rates"}
        record = run(sweep, output / f"{name}_final", sweep.final_tokens, {**options, "learning_rate": rate})
        finals.append(write_json(results.with_name(f"{results.name}_{name}.json"), record))
        print(
            f"{name:16} lr {rate:<8} validation loss {loss_of(record):.4f} at {record['tokens']:,} tokens", flush=True
        )
        print(compare(finals, output / "comparison", f"Pretraining: {results.name}") / "comparison.html", flush=True)


if __name__ == "__main__":
    run_main(main)
