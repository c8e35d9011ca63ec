"""Does the g-SNR of a fresh network predict its accuracy: 36 cells of NATS-Bench's topology space on the digits.

    python -m recipes.sweep cells_sweep.yaml
    python -m recipes.studies.cells --record recipes/results/study_cells.json

The sweep trains every cell with three optimizers. This program measures the g-SNR of each parameter of a fresh cell on
one batch, and correlates what it says of a cell with the accuracy under each optimizer at its best rate (Spearman's
rank correlation, over the cells whose output depends on their input).
"""

from recipes.common.start import run_main

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import set_seed

from hf_sai import SGDSaI, gsnr_table
from recipes.common.config import read_yaml
from recipes.common.errors import UserError
from recipes.common.files import check_writable, write_json
from recipes.common.provenance import run_record, sealed
from recipes.images.cells import is_connected
from recipes.images.data import ImageArguments, load_images
from recipes.images.models import ImageModelArguments, build_model
from recipes.sweep.report import read_results

BATCH = 256
# What is known of a cell before it trains: of its g-SNR / sqrt(d) the least and the median over the parameters and the
# decades between its least and its largest; for comparison its size.
FEATURES = ("least", "median", "decades", "parameters")


def measure(model: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Of a fresh cell, seed 0: whether its output depends on its input, and `FEATURES`.

    Args:
        model: `cell_N`.
        base: the configuration of the sweep's runs.
    """
    set_seed(0)
    data = load_images(ImageArguments(dataset=base["dataset"]), 0)
    chosen = ImageModelArguments(model=model, model_options=base.get("model_options"))
    network = build_model(chosen, data.image_size, data.channels, data.classes).train()
    batch = data.train.__getitems__(list(range(BATCH)))
    logits = network(pixel_values=batch["pixel_values"]).logits
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    optimizer = SGDSaI(network.parameters(), lr=1e-3, scaling="raw")
    optimizer.step()
    ratios = [row.gsnr / math.sqrt(row.numel) for row in gsnr_table(optimizer, network) if row.calibrated]
    return {
        "cell": model,
        "connected": is_connected(int(model.removeprefix("cell_"))),
        "least": min(ratios),
        "median": statistics.median(ratios),
        "decades": math.log10(max(ratios) / min(ratios)),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each optimizer the rate with the best mean accuracy over all cells, and its accuracies by cell.

    Rates at which not every cell has run are left out.
    """
    found: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        rates = found.setdefault(row["run"], {})
        rates.setdefault(row["point"]["learning_rate"], {})[row["point"]["model"]] = row["value"] or 0.0  # diverged
    most = max(len(cells) for rates in found.values() for cells in rates.values())
    found = {name: {x: cells for x, cells in rates.items() if len(cells) == most} for name, rates in found.items()}
    if missing := [name for name, rates in found.items() if not rates]:
        raise UserError(f"the sweep is not finished: {', '.join(missing)} has no rate with {most} cells; run it again")
    best = {name: max(rates, key=lambda rate: statistics.fmean(rates[rate].values())) for name, rates in found.items()}
    return {
        name: {
            "learning_rate": best[name],
            "at_edge": best[name] in (min(rates), max(rates)),
            "accuracy": rates[best[name]],
            "mean_by_rate": {f"{rate:g}": statistics.fmean(cells.values()) for rate, cells in sorted(rates.items())},
        }
        for name, rates in found.items()
    }


def correlations(cells: Sequence[Mapping[str, Any]], accuracy: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of each of `FEATURES` with the accuracy over the connected cells, and its p-value."""
    connected = [cell for cell in cells if cell["connected"]]
    result = {}
    for feature in FEATURES:
        rho, p = spearmanr([cell[feature] for cell in connected], [accuracy[cell["cell"]] for cell in connected])
        result[feature] = {"rho": round(float(rho), 4), "p": float(f"{p:.3g}")}
    return result


def main() -> None:
    """Measure, print the correlations, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path("recipes/results/cells_sweep.json")
    parser.add_argument("--sweep", type=Path, default=results, help="what the sweep wrote")
    parser.add_argument("--record", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    if args.record:
        check_writable("--record", args.record.parent)
    content = read_results(args.sweep)
    best, base = best_rates(content["runs"]), read_yaml(content["base"])
    cells = [measure(cell, base) for cell in next(iter(best.values()))["accuracy"]]
    for own in best.values():
        own["spearman"] = correlations(cells, own["accuracy"])
    for name, own in best.items():
        print(f"{name}, lr {own['learning_rate']:g}: {own['spearman']}")
    if args.record:
        write_json(args.record, sealed(run_record("studies.cells", [], cells=cells, optimizers=best)))


if __name__ == "__main__":
    run_main(main)
