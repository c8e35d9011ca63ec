"""The benchmark of the README: `cpu` on this machine, `cuda` as one command on a GPU, within nine minutes.

    python recipes/bench_step.py --suite cpu
    python recipes/bench_step.py --suite cuda

`cpu`: GPT-2 124M in float32, all rivals, the fast ones in turn. `cuda`: the tests of tests/cuda, which configuration
of the kernel is fastest, then GPT-2 XL in float32 and bfloat16, a LoRA set, both ViTs, Llama-2 7B's shapes in bfloat16,
and full fine-tuning of the latter with gradient release (recipes/bench_release.py). Parts for which no time is left are
marked.
Results are written to recipes/results/bench_*.json and .png; a short table of what the README claims comes last.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hf_sai.bench.measure import Result, bench
from hf_sai.bench.report import chart, table, write_json
from hf_sai.bench.rivals import RIVALS
from hf_sai.bench.shapes import model
from recipes import bench_release
from recipes.common import machine, versions

ROOT = Path(__file__).resolve().parents[1]

_LARGE = ["sgd_sai", "sgd_sai_bf16", "sgd_sai_int8", "sgd_fused", "adamw_8bit_bnb", "adamw_8bit_torchao", "adafactor"]
# On a CPU these take seconds a step: fewer steps, and not in turn with the others.
_SLOW_ON_CPU = ["sgd_sai_int8", "prodigy", "adafactor", "adamw_8bit_bnb", "muon"]
# (model, dtype, optimizers, at most so many steps); the first ones are those that claims are made of.
_SUITES: dict[str, list[tuple[str, torch.dtype, list[str], int]]] = {
    "cpu": [
        ("gpt2", torch.float32, [key for key in RIVALS if key not in _SLOW_ON_CPU], 1000),
        ("gpt2", torch.float32, _SLOW_ON_CPU, 3),
    ],
    "cuda": [
        ("gpt2-xl", torch.float32, list(RIVALS), 1000),
        ("gpt2-xl", torch.bfloat16, list(RIVALS), 1000),
        ("lora", torch.float32, [key for key in RIVALS if key != "adam_mini"], 1000),
        ("llama-2-7b", torch.bfloat16, _LARGE, 10),
        ("vit-h-14", torch.float32, list(RIVALS), 1000),
        ("vit-s-16", torch.float32, list(RIVALS), 1000),
        ("gpt2", torch.float32, list(RIVALS), 1000),
    ],
}
# What the README claims: (model, dtype, row, divided by, at most).
_CLAIMS = {
    "cpu": [
        ("gpt2", "float32", "sgd_sai", "adamw_fused", 1.05),
        ("gpt2", "float32", "sgd_sai", "sgd_sai_authors", 0.70),
        ("gpt2", "float32", "sgd_sai", "sgd_fused", 1.10),
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
# Tile, elements at once, warps: which of them a GPU likes best can only be tried on it.
_CONFIGURATIONS = [
    (8192, 1024, 4),
    (4096, 1024, 4),
    (16384, 1024, 4),
    (8192, 2048, 8),
    (8192, 2048, 4),
    (2048, 2048, 4),
    (4096, 512, 4),
]


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
    """tests/cuda in a process of its own; its last line."""
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


def sweep(steps: int = 10) -> dict[str, float]:
    """Milliseconds of a GPT-2 XL step for each configuration of the kernel; the fastest is left in force."""
    from hf_sai import fused

    times = {}
    for tile, piece, warps in _CONFIGURATIONS:
        fused.TILE, fused.PIECE, fused.WARPS = tile, piece, warps
        total = 0.0
        for dtype, key in ((torch.float32, "sgd_sai"), (torch.bfloat16, "sgd_sai_int8")):
            (row,) = bench("gpt2-xl", model("gpt2-xl"), optimizers=[key], dtype=dtype, device="cuda", steps=steps).rows
            assert row.step_ms is not None, row.error
            times[f"tile {tile}, piece {piece}, {warps} warps, {key}"] = row.step_ms
            total += row.step_ms
        times[f"tile {tile}, piece {piece}, {warps} warps"] = total
    best = min(_CONFIGURATIONS, key=lambda c: times[f"tile {c[0]}, piece {c[1]}, {c[2]} warps"])
    fused.TILE, fused.PIECE, fused.WARPS = best
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(_SUITES), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="ordinary steps timed for each optimizer")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=530, help="begin nothing new after so many (default: 530)")
    parser.add_argument("--optimizers", nargs="+", choices=list(RIVALS), metavar="NAME", help="only these")
    parser.add_argument("--name", default="", help="part of the files' name, to keep several runs apart")
    parser.add_argument("--results", type=Path, default=ROOT / "recipes" / "results", help="where files are written")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    cuda = args.suite == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--suite cuda needs a CUDA device, and torch finds none")
    if args.threads:
        torch.set_num_threads(args.threads)
    conditions: dict[str, Any] = {"suite": args.suite, "steps": args.steps, "load_average_before": os.getloadavg()}
    if cuda:
        conditions["tests"] = run_tests()
        print("tests/cuda:", conditions["tests"], flush=True)
        conditions["kernel_ms"] = sweep()
        print(*(f"  {ms:8.3f} ms  {what}" for what, ms in conditions["kernel_ms"].items()), sep="\n", flush=True)
        rows = bench_release.run_all(bench_release.LLAMA_2_7B, "cuda", 20, 1024, deadline - 240)
        conditions["full_fine_tuning"] = rows
        print(bench_release.as_table(rows), flush=True)
    results = []
    for name, dtype, optimizers, at_most in _SUITES[args.suite]:
        optimizers = [key for key in optimizers if key in (args.optimizers or RIVALS)]
        if not optimizers:
            continue
        if time.monotonic() > deadline:
            print(f"{name} {dtype}: not measured, out of time")
            continue
        results.append(
            bench(
                name,
                model(name),
                optimizers=optimizers,
                dtype=dtype,
                device="cuda" if cuda else "cpu",
                steps=min(args.steps, at_most),
                deadline=deadline,
                progress=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
            )
        )
        print(table(results[-1]), end="\n\n", flush=True)
        # After each model, so that a run cut short leaves what it has measured.
        found = [
            {"claim": text, "measured": value, "at_most": limit} for text, value, limit in claims(args.suite, results)
        ]
        stem = args.results / f"bench_{args.suite}{args.name and '_'}{args.name}"
        write_json(
            stem.with_suffix(".json"),
            results,
            **conditions,
            load_average_after=os.getloadavg(),
            claims=found,
            machine=machine(),
            versions=versions(),
        )
    if results:
        chart(stem.with_suffix(".png"), results)
    for text, value, limit in claims(args.suite, results):
        measured = "not measured" if value is None else f"{value:.3f}"
        verdict = "" if value is None else "ok" if value <= limit else "MISSED"
        print(f"{text:<58}{measured:>14}   at most {limit:.2f}   {verdict}")
    if cuda:
        print(bench_release.as_table(conditions["full_fine_tuning"]))
        print("tests/cuda:", conditions["tests"])


if __name__ == "__main__":
    main()
