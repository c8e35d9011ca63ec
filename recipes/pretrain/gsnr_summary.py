"""What the g-SNR of some pretraining runs looks like, as one small JSON, and a figure of the first of them over time.

    python -m recipes.pretrain.gsnr_summary recipes/results/gsnr_5m.json outputs/gsnr/base outputs/gsnr/adamw ...

Each folder is an `output_dir` of `recipes.pretrain` that ran with `gsnr_every`. For each run and kind of block, [least,
median, largest] over its blocks and the measured steps of: g-SNR / sqrt(d); g-SNR in units of the block's at the first
step; the scale that a re-calibration would give in units of the kept one, as a whole and over its mean over blocks.
"""

from __future__ import annotations

from recipes.common.start import run_main

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_sai.blocks import KINDS
from hf_sai.gsnr_plots import common_drift, plot_over_time
from hf_sai.monitor import read_record, write_json
from recipes.common.errors import UserError

SETTINGS = ("optim", "optim_args", "learning_rate", "lr_scheduler_type", "init_scheme", "max_grad_norm", "bf16", "seed")


def spread(values: Iterable[float]) -> list[float] | None:
    """Least, median and largest, to five digits; None of nothing."""
    values = list(values)
    if not values:
        return None
    return [float(f"{x:.5g}") for x in (min(values), statistics.median(values), max(values))]


def summary(folder: Path) -> dict[str, Any]:
    """One run."""
    try:
        run = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        measured = read_record(folder / "gsnr.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no finished run of recipes.pretrain with gsnr_every: {error}") from error
    common = common_drift(measured)
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        blocks = [block for block in measured["blocks"] if block["kind"] == kind]
        if not blocks:
            continue
        now = [(block, i, x) for block in blocks for i, x in enumerate(block["gsnr_now"]) if x is not None]
        kinds[kind] = {
            "blocks": len(blocks),
            "to_sqrt_d": spread(x / math.sqrt(block["numel"]) for block, _, x in now),
            "to_first": spread(x / block["gsnr_now"][0] for block, _, x in now if block["gsnr_now"][0]),
            "drift": spread(block["drift"][i] for block, i, _ in now if block["drift"]),
            "drift_over_mean": spread(block["drift"][i] / common[i] for block, i, _ in now if block["drift"]),
        }
    return {
        "run": folder.name,
        "config": {key: run["config"][key] for key in SETTINGS if key in run["config"]},
        "parameters": run["model"]["parameters"],
        "tokens_per_step": run["speed"]["tokens_per_step"],
        "steps": run["steps"],
        "tokens": run["tokens"],
        "gsnr_every": measured["every"],
        "measured_steps": len(measured["steps"]),
        "eval_loss": run["final"].get("eval_loss"),
        "common_drift": spread(common) if any(block["drift"] for block in measured["blocks"]) else None,
        "kinds": kinds,
    }


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError("usage: python -m recipes.pretrain.gsnr_summary OUTPUT.json RUN_FOLDER ...")
    output, *folders = map(Path, sys.argv[1:])
    runs = [summary(folder) for folder in folders]
    last = json.loads((folders[-1] / "record.json").read_text(encoding="utf-8"))
    write_json(output, {"runs": runs, "machine": last["machine"], "versions": last["versions"]})
    plot_over_time(read_record(folders[0] / "gsnr.json"), output.with_name(f"{output.stem}_time.png"))
    for run in runs:
        print(run["run"], f"{run['tokens']:,} tokens, {run['measured_steps']} measurements")
        for kind, found in run["kinds"].items():
            print(
                f"  {kind:20}{found['blocks']:4}  g-SNR/sqrt(d) {found['to_sqrt_d']}  drift {found['drift_over_mean']}"
            )


if __name__ == "__main__":
    run_main(main)
