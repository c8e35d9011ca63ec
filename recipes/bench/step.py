"""The benchmark of the step: `cpu` on this machine, within five minutes; `cuda` on a GPU, within nine.

    python -m recipes.bench --suite cpu
    python -m recipes.bench --suite cuda
    python -m recipes.sweep.tables            # the tables of README.md and docs, from what was written

`cpu`: GPT-2 124M in float32: the fast optimizers in turn, on all cores (bench_cpu.json) and on one (bench_cpu_1thread),
then the slow ones on all cores. `cuda`: the tests of tests/cuda, full fine-tuning of Llama-2 7B's shapes with gradient
release (recipes/bench/release.py), GPT-2 XL in float32 and bfloat16, a LoRA set, Llama-2 7B's shapes in bfloat16, both
ViTs and GPT-2. Parts for which no time is left are marked.
Results are written to recipes/results/bench_*.json and .png; a short table of the targets comes last.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_sai.bench.measure import Result, bench
from hf_sai.bench.report import chart, table, write_json
from hf_sai.bench.rivals import RIVALS
from hf_sai.bench.shapes import model
from recipes.bench import release
from recipes.common.records import machine, versions

ROOT = Path(__file__).resolve().parents[2]


class Part(NamedTuple):
    """What is run in one go, and which file it goes to."""

    model: str
    dtype: torch.dtype
    optimizers: list[str]
    at_most: int = 1000  # ordinary steps, whatever was asked for
    settling: int = 3
    file: str = ""  # after bench_SUITE
    threads: int | None = None  # None: as many as there are cores


_LARGE = ["sgd_sai", "sgd_sai_bf16", "sgd_sai_int8", "sgd_fused", "adamw_8bit_bnb", "adamw_8bit_torchao", "adafactor"]
# On a CPU these take a second a step and more: fewer steps, and not in turn with the others.
_SLOW_ON_CPU = ["prodigy", "adafactor", "adamw_8bit_bnb"]
_SLOWEST_ON_CPU = ["muon", "sgd_sai_int8"]
_FAST_ON_CPU = [key for key in RIVALS if key not in _SLOW_ON_CPU + _SLOWEST_ON_CPU]
_ON_ONE_THREAD = [
    "sgd_sai",
    "sgd_sai_no_decay",
    "sgd_sai_bf16",
    "sgd_sai_authors",
    "sgd_fused",
    "adamw_foreach",
    "adamw_fused",
]
# The first parts of each are those that claims are made of.
_SUITES: dict[str, list[Part]] = {
    "cpu": [
        Part("gpt2", torch.float32, _FAST_ON_CPU),
        Part("gpt2", torch.float32, _ON_ONE_THREAD, file="_1thread", threads=1),
        Part("gpt2", torch.float32, _SLOW_ON_CPU, at_most=3, settling=1),
        Part("gpt2", torch.float32, _SLOWEST_ON_CPU, at_most=1, settling=0),
    ],
    "cuda": [
        Part("gpt2-xl", torch.float32, list(RIVALS)),
        Part("gpt2-xl", torch.bfloat16, list(RIVALS)),
        Part("lora", torch.float32, [key for key in RIVALS if key != "adam_mini"]),
        Part("llama-2-7b", torch.bfloat16, _LARGE, at_most=10),
        Part("vit-h-14", torch.float32, list(RIVALS)),
        Part("vit-s-16", torch.float32, list(RIVALS)),
        Part("gpt2", torch.float32, list(RIVALS)),
    ],
}
# Start nothing after N seconds.
_SECONDS = {"cpu": 270.0, "cuda": 530.0}
# The targets: (model, dtype, row, divided by, at most).
_CLAIMS = {
    "cpu": [
        ("gpt2", "float32", "sgd_sai", "adamw_fused", 1.05),
        ("gpt2", "float32", "sgd_sai", "sgd_sai_authors", 0.70),
        ("gpt2", "float32", "sgd_sai", "sgd_fused", 1.10),
        ("gpt2", "float32", "sgd_sai_no_decay", "sgd_fused", 1.10),
        ("gpt2", "float32", "sgd_sai", "first step less allocation", 3.0),
    ],
    "cuda": [
        ("gpt2-xl", "float32", "sgd_sai", "copy", 1.15),
        ("gpt2-xl", "float32", "sgd_sai", "adamw_fused", 0.80),
        ("gpt2-xl", "float32", "sgd_sai", "adam_mini", 0.33),
        ("gpt2-xl", "float32", "sgd_sai", "sgd_sai_authors", 0.40),
        ("gpt2-xl", "float32", "sgd_sai", "first step less allocation", 2.0),
        ("gpt2-xl", "bfloat16", "sgd_sai", "copy", 1.20),
        ("lora", "float32", "sgd_sai", "adamw_fused", 1.00),
    ],
}


def claims(suite: str, results: list[Result]) -> Iterator[tuple[str, float | None, float]]:
    """What each claim says, what was measured (None if it was not), and its limit."""
    rows = {(r.model, r.dtype, row.optimizer): row for r in results for row in r.rows}
    for name, dtype, key, against, limit in _CLAIMS[suite]:
        row, other = rows.get((name, dtype, key)), rows.get((name, dtype, against))
        value = None
        if row is not None and row.step_ms is not None:
            if against == "copy" and row.of_copy:
                value = 1 / row.of_copy
            elif against == "first step less allocation" and row.first_step_less_allocation_ms is not None:
                value = row.first_step_less_allocation_ms / row.step_ms
            elif other is not None and other.step_ms is not None:
                value = row.step_ms / other.step_ms
        what = {"copy": "step / floor of the copy bandwidth", "first step less allocation": "first step / step"}
        yield f"{name} {dtype}: {key} {what.get(against, f'/ {against}')}", value, limit


def run_tests() -> str:
    """tests/cuda in a separate process; its last line."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--maxfail=12",
        "-m",
        "cuda",
        "tests/cuda",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:])
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(_SUITES), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="ordinary steps timed for each optimizer")
    parser.add_argument("--seconds", type=float, help=f"start nothing after N seconds (default: {_SECONDS})")
    parser.add_argument("--optimizers", nargs="+", choices=list(RIVALS), metavar="NAME", help="only these")
    parser.add_argument("--results", type=Path, default=ROOT / "recipes" / "results", help="where files are written")
    args = parser.parse_args()
    deadline = time.monotonic() + (args.seconds or _SECONDS[args.suite])
    cuda = args.suite == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--suite cuda needs a CUDA device, and torch finds none")
    conditions: dict[str, Any] = {"suite": args.suite, "steps": args.steps, "load_average_before": os.getloadavg()}
    if cuda:
        conditions["tests"] = run_tests()
        print("tests/cuda:", conditions["tests"], flush=True)
        rows = release.run_all(release.LLAMA_2_7B, "cuda", 20, 1024, deadline - 150)
        conditions["full_fine_tuning"] = rows
        print(release.as_table(rows), flush=True)
    results: dict[str, list[Result]] = {}  # by file
    for part in _SUITES[args.suite]:
        optimizers = [key for key in part.optimizers if key in (args.optimizers or RIVALS)]
        if not optimizers:
            continue
        if time.monotonic() > deadline:
            print(f"{part.model} {part.dtype}: not measured, out of time")
            continue
        if not cuda:
            torch.set_num_threads(part.threads or os.cpu_count() or 1)
        in_file = results.setdefault(part.file, [])
        in_file.append(
            bench(
                part.model,
                model(part.model),
                optimizers=optimizers,
                dtype=part.dtype,
                device="cuda" if cuda else "cpu",
                steps=min(args.steps, part.at_most),
                settling=part.settling,
                deadline=deadline,
                progress=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
            )
        )
        print(table(in_file[-1]), end="\n\n", flush=True)
        # After each part, so that a run cut short leaves what it has measured.
        path = args.results / f"bench_{args.suite}{part.file}.json"
        found = [
            {"claim": text, "measured": value, "at_most": limit} for text, value, limit in claims(args.suite, in_file)
        ]
        write_json(
            path,
            in_file,
            **conditions,
            load_average_after=os.getloadavg(),
            claims=found,
            machine=machine(),
            versions=versions(),
        )
        if any(row.step_ms is not None for result in in_file for row in result.rows):
            chart(path.with_suffix(".png"), in_file)
    for file, in_file in results.items():
        print(f"bench_{args.suite}{file}.json")
        for text, value, limit in claims(args.suite, in_file):
            measured = "not measured" if value is None else f"{value:.3f}"
            verdict = "" if value is None else "ok" if value <= limit else "MISSED"
            print(f"  {text:<58}{measured:>14}   at most {limit:.2f}   {verdict}")
    if cuda:
        print(release.as_table(conditions["full_fine_tuning"]))
        print("tests/cuda:", conditions["tests"])
