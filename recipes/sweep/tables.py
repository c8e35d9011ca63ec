"""The tables of README.md and docs/*.md, from `recipes/results/*.json`: `python -m recipes.sweep.tables [--check]`.

A table stands between `<!-- table: KIND RECORD ... -->` and `<!-- end -->`: a kind of `TABLES` and names of files in
`recipes/results/` without `.json`; `versus` takes several of them, the others one. With `--check` nothing is written,
and the exit status is 1 if a table differs from its record.
"""

from recipes.common.start import run_main

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_sai.commands.gsnr import ratios_of
from recipes.common.config import find_config
from recipes.common.errors import UserError
from recipes.common.files import write_text
from recipes.common.provenance import sealed
from recipes.sweep.report import larger_is_better, read_results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"


def pages() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweep(record: Mapping[str, Any]) -> str:
    """A row for each optimizer of a sweep: its best point, the metric there over the seeds, and its state."""
    metric = str(record["metric"])
    as_text = (lambda x: f"{100 * x:.1f}") if larger_is_better(metric) else "{:.3f}".format
    every = [*record["runs"], *record["finals"]]
    scores = list(dict.fromkeys(score for row in record["finals"] for score in row.get("scores") or ()))
    rows = []
    for name, best in record["best"].items():
        grid = [row for row in record["runs"] if row["run"] == name]
        finals = [row for row in record["finals"] if row["run"] == name]
        values = [row["value"] for row in finals or [row for row in grid if row["point"] == best["point"]]]
        diverged = sum(row["value"] is None for row in [*grid, *finals])
        value = "diverged" if None in values else as_text(statistics.fmean(values))
        if len(values) > 1 and None not in values:
            value += f" ({as_text(min(values))} to {as_text(max(values))})"
        rows.append(
            [
                name,
                ", ".join(f"{x:g}{' (edge)' if axis in best['at_edge'] else ''}" for axis, x in best["point"].items()),
                value,
                *(f"{statistics.fmean(r['scores'][score] for r in finals):.3f}" if finals else "-" for score in scores),
                f"{diverged} of {len(grid) + len(finals)}",
                f"{grid[0]['optimizer_state_bytes'] / 1e3:,.0f}",
            ]
        )
    axes = ", ".join(axis.replace("_", " ") for axis in next(iter(record["best"].values()))["point"])
    unit = ", %" if larger_is_better(metric) else ""
    table = markdown(
        ["", axes, f"{metric.rpartition('.')[2]}{unit} (range)", *scores, "diverged", "state kB"],
        rows,
    )
    seeds = len({row["seed"] for row in record["finals"] or record["runs"]})
    then = ", then" if record["finals"] else ","
    at_length = f"{then} {seeds} seed{'s' * (seeds > 1)} of it{': mean and range' * (seeds > 1)}"
    devices = ", ".join(sorted({str(row["device"]) for row in every}))
    several = f" {record['origins']}" if record["origins"] else ""
    command = f"`python -m recipes.sweep {record['sweep']}`"
    return f"{table}\n\nThe best point of each optimizer's grid{at_length}. {devices}.{several} {command}"


def gsnr(record: Mapping[str, Any]) -> str:
    """g-SNR / sqrt(d) over the blocks of a kind, in each setting of an `hf-sai gsnr --json` record."""
    results = record["results"]
    kinds = dict.fromkeys(block["kind"] for block in results[0]["blocks"])
    rows = []
    for kind in kinds:
        ratios = [ratios_of(result["blocks"], kind) for result in results]
        cells = [f"{min(found):.4f} to {max(found):.4f}" if found else "-" for found in ratios]
        rows.append([kind, str(len(ratios[0])), *cells])
    titles = [f"{result['init']}, batch {result['batch_size']}" for result in results]
    parameters = sum(block["numel"] for block in results[0]["blocks"])
    return (
        f"{markdown(['', 'blocks', *titles], rows)}\n\nA fresh GPT-2 of {parameters / 1e6:.1f} M parameters, a "
        f"vocabulary of {record['vocabulary']:,}, sequences of {record['block_size']} tokens, seed {record['seed']}; "
        f"torch {record['versions']['torch']}."
    )


def speed(record: Mapping[str, Any]) -> str:
    """Step, first step and state of each optimizer on the first model of a benchmark's record."""
    first = record["results"][0]
    same = [one for one in record["results"] if all(one[key] == first[key] for key in ("model", "dtype", "threads"))]
    measured = {row["optimizer"]: row for one in same for row in one["rows"] if row["step_ms"] is not None}
    rows = []
    for row in measured.values():
        spread = "" if row["quartiles_ms"] is None else " ({:.0f} to {:.0f})".format(*row["quartiles_ms"])
        rows.append(
            [
                row["title"],
                f"{row['step_ms']:.0f}{spread}",
                f"{row['step_ms'] / measured['adamw_fused']['step_ms']:.2f}",
                f"{row['first_step_ms']:.0f}",
                f"{row['state_bytes'] / 1e6:.0f}",
            ]
        )
    header = [f"{first['title']}, {first['dtype']}", "step ms (quartiles)", "/ AdamW fused", "first ms", "state MB"]
    return (
        f"{markdown(header, rows)}\n\nMedian of {max(row['steps'] for row in measured.values())} steps or fewer, "
        f"{first['threads']} threads; {record['machine']['cpu']}, torch {record['versions']['torch']}."
    )


def rates(record: Mapping[str, Any]) -> str:
    """A row for each learning rate of a sweep's grid and a column for each optimizer: mean and range over seeds."""
    runs = list(dict.fromkeys(row["run"] for row in record["runs"]))
    tried = sorted({float(row["point"]["learning_rate"]) for row in record["runs"]})
    rows = []
    for rate in tried:
        cells = []
        for name in runs:
            own = [r for r in record["runs"] if r["run"] == name and float(r["point"]["learning_rate"]) == rate]
            values = [row["value"] for row in own]
            kept = [value for value in values if value is not None]
            cell = f"{statistics.fmean(kept):.3f} ({min(kept):.3f} to {max(kept):.3f})" if kept else "-"
            cells.append(f"{len(values) - len(kept)} of {len(values)} diverged" if len(kept) < len(values) else cell)
        rows.append([f"{rate:g}", *cells])
    devices = ", ".join(sorted({str(row["device"]) for row in record["runs"]}))
    seeds = [sum(r["run"] == name for r in record["runs"]) / len(tried) for name in runs]
    counted = f"{seeds[0]:g} seeds each" if len(set(seeds)) == 1 and seeds[0] % 1 == 0 else "not every run has finished"
    table, command = markdown(["learning rate", *runs], rows), f"`python -m recipes.sweep {record['sweep']}`"
    return f"{table}\n\nMean and range, {counted}. {devices}. {command}"


def versus(*records: Mapping[str, Any]) -> str:
    """A row for each job of some sweeps: SGD-SaI beside AdamW at AdamW's best learning rate, means over seeds.

    Of the rates that both ran with equally many seeds, at least two. A job is a pair of runs `AdamW...` and
    `SGD-SaI...` of one sweep, at the grid's length and at that of `final`; its title is the head of the sweep's file.
    """
    rows, devices = [], set()
    for record in records:
        head = find_config(record["sweep"]).read_text(encoding="utf-8").splitlines()[0]
        for stage in ("runs", "finals"):
            found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
            for row in record[stage]:
                rates = found.setdefault(row["run"], {})
                rates.setdefault(float(row["point"]["learning_rate"]), []).append(row)
            for name, theirs in found.items():
                ours = found.get(name.replace("AdamW", "SGD-SaI"), {})
                both = [rate for rate, own in theirs.items() if 1 < len(own) == len(ours.get(rate, ()))]
                if not name.startswith("AdamW") or not both:
                    continue
                mean = {rate: statistics.fmean(row["value"] for row in theirs[rate]) for rate in both}
                rate = min(both, key=mean.__getitem__)
                pair = [[row["value"] for row in own[rate]] for own in (theirs, ours)]
                tried = [float(row["point"]["learning_rate"]) for row in record["runs"] if row["run"] == name]
                edge = " (edge)" if rate in (min(tried), max(tried)) else ""
                state = [own[rate][0]["optimizer_state_bytes"] for own in (theirs, ours)]
                title = head.removeprefix("# ").partition(":")[0] + name.removeprefix("AdamW")
                if stage == "finals":
                    tokens = record["final_options"].get("max_tokens")
                    length = f"{tokens / 1e6:g} M tokens" if tokens else "at length"
                    title = re.sub(r", [\d.]+ M tokens$", "", title) + f", {length}"
                rows.append(
                    [
                        title,
                        f"{rate:g}{edge}",
                        *(f"{statistics.fmean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in pair),
                        f"{100 * (statistics.fmean(pair[1]) / mean[rate] - 1):+.1f} %",
                        f"{state[1] / state[0]:.3f}",
                        str(len(pair[0])),
                    ]
                )
                devices |= {str(row["device"]) for row in theirs[rate] + ours[rate]}
    header = ["validation loss", "learning rate", "AdamW (range)", "SGD-SaI (range)", "difference", "state", "seeds"]
    return (
        f"{markdown(header, rows)}\n\nBoth at the learning rate at which AdamW is best of those tried; *edge*: the "
        f"lowest or highest of them. *State*: SGD-SaI's optimizer state over AdamW's. {', '.join(sorted(devices))}."
    )


def _check_unedited(record: Mapping[str, Any]) -> None:
    if sealed(record)["digest"] != record.get("digest"):
        raise UserError(f"the record of {record['recipe']!r} was edited: its digest differs; make it again")


def _sharded(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """A title, AdamW's row and SGD-SaI's, for each model and number of devices of `recipes.studies.sharded`."""
    _check_unedited(record)
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault((row["model"], row["devices"]), {})[row["optimizer"]] = row
    return [(f"{model.upper()} on {devices}", own["AdamW"], own["SGD-SaI"]) for (model, devices), own in found.items()]


def sharded_memory(record: Mapping[str, Any]) -> str:
    """What a device holds of a model, a row for each size and number of devices: AdamW beside SGD-SaI."""
    rows = []
    for title, *both in _sharded(record):
        model = [row["parameter_bytes"] + row["gradient_bytes"] for row in both]
        state = [row["state_bytes"] + row["beside_state_bytes"] for row in both]
        peak = [max(step.get("peak_bytes", 0) for step in row["steps"].values()) for row in both]
        rows.append(
            [
                title,
                f"{model[0] / 1e9:.2f}",
                *(f"{size / 1e9:.2f}" for size in state),
                f"{state[1] / state[0]:.3f}",
                *(f"{sum(sizes) / 1e9:.2f}" for sizes in zip(model, state, strict=True)),
                *(f"{size / 1e9:.2f}" for size in peak),
            ]
        )
    header = ["GB on a device", "parameters, gradients", "state, AdamW", "SGD-SaI", "ratio"]
    header += ["sum, AdamW", "SGD-SaI", "temporary, AdamW", "SGD-SaI"]
    return (
        f"{markdown(header, rows)}\n\nLlama-2's shapes under FSDP2, parameters and gradients in "
        f"{record['config']['dtype']}. *Sum*: of these. *Temporary*: the most that the operations of a step hold "
        f"besides, with `foreach=True`. torch {record['versions']['torch']}. `{record['command']}`"
    )


def sharded_steps(record: Mapping[str, Any]) -> str:
    """Collectives of each kind of step, and the bytes that a step reads and writes: AdamW beside SGD-SaI."""

    def collectives(step: Mapping[str, Any]) -> str:
        counts = step["collectives"].values()
        size = sum(own["bytes"] for own in counts)
        return f"{sum(own['number'] for own in counts)} ({size / 1e6:.2f} MB)" if size else "none"

    def moved(step: Mapping[str, Any]) -> str:
        return f"{(step['read_bytes'] + step['written_bytes']) / 1e9:.1f}"

    kinds = sorted({kind for row in record["rows"] for step in row["steps"].values() for kind in step["collectives"]})
    rows = []
    for title, adamw, sgd_sai in _sharded(record):
        theirs, ours = adamw["steps"], sgd_sai["steps"]
        each = [theirs["ordinary"], *(ours[kind] for kind in ("ordinary", "first", "calibration", "measuring"))]
        traffic = [theirs["ordinary"], ours["ordinary"], ours["calibration"]]
        rows.append([title, *map(collectives, each), *map(moved, traffic)])
    header = ["", "collectives: AdamW", "SGD-SaI, ordinary", "first", "calibration", "measuring"]
    header += ["read and written, GB: AdamW", "SGD-SaI, ordinary", "calibration"]
    return (
        f"{markdown(header, rows)}\n\nOf one device in one step, with `foreach=True`; collectives: {', '.join(kinds)}. "
        f"{record['config']['dtype']}, torch {record['versions']['torch']}. `{record['command']}`"
    )


def partitions(*records: Mapping[str, Any]) -> str:
    """A row for each partition, and for each sweep its value frozen and running and its state over AdamW's."""

    def value(record: Mapping[str, Any], name: str) -> str:
        best, seeds = record["best"].get(name), record["over_seeds"].get(name)
        if best is None:
            return "-"
        percent = 100 if larger_is_better(record["metric"]) else 1
        digits, edge = (1, 3)[percent == 1], "*" * bool(best["at_edge"])
        if seeds is None or seeds["mean"] is None:
            return f"{percent * best['value']:.{digits}f}{edge}" if math.isfinite(best["value"]) else "diverged"
        mean, least, most = (f"{percent * seeds[key]:.{digits}f}" for key in ("mean", "min", "max"))
        return f"{mean}{edge} ({least} to {most})" if seeds["seeds"] > 1 else f"{mean}{edge}"

    def state(record: Mapping[str, Any], name: str) -> int:
        return next((int(r["optimizer_state_bytes"]) for r in record["runs"] if r["run"] == name), 0)

    names = dict.fromkeys(re.sub(" (frozen|running)$", "", name) for name in records[0]["best"])
    rows, header = [], [""]
    for record in records:
        title = find_config(record["sweep"]).read_text(encoding="utf-8").splitlines()[0]
        job = title.partition("scale, ")[2].partition(":")[0]
        header += [f"{job}: frozen", "running", "state"]
    for name in names:
        cells = []
        for record in records:
            single = name in record["best"]
            ratio = state(record, name if single else f"{name} frozen") / state(record, "AdamW")
            both = [value(record, name), ""] if single else [value(record, f"{name} {way}") for way in _WAYS]
            cells += [*both, f"{ratio:.3f}"]
        rows.append([name.replace("row_column", "row and column"), *cells])
    counts = {record["over_seeds"].get(name, {}).get("seeds", 1) for record in records for name in record["best"]}
    most = max(counts)
    seeds = f"{most} seed{'s' * (most > 1)}" if len(counts) == 1 else "those seeds that have run"
    devices = ", ".join(sorted({str(row["device"]) for record in records for row in record["runs"]}))
    commands = ", ".join(f"`python -m recipes.sweep {record['sweep']}`" for record in records)
    return (
        f"{markdown(header, rows)}\n\nAt the best rate of the grid, mean and range of {seeds}. An asterisk: the "
        f"best rate is the lowest or the highest. *State*: over AdamW's. {devices}. {commands}"
    )


_WAYS = ("frozen", "running")


def cells(record: Mapping[str, Any]) -> str:
    """Accuracy of each optimizer over the connected cells of `recipes.studies.cells`, and what correlates with it."""
    _check_unedited(record)
    connected = [cell["cell"] for cell in record["cells"] if cell["connected"]]
    most = {cell: max(own["accuracy"][cell] for own in record["optimizers"].values()) for cell in connected}
    rows, correlated = [], []
    for name, own in record["optimizers"].items():
        values = [100 * own["accuracy"][cell] for cell in connected]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        best = sum(own["accuracy"][cell] == most[cell] for cell in connected)
        rate = f"{own['learning_rate']:g}{' (edge)' if own['at_edge'] else ''}"
        rows.append([name, rate, f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{min(values):.1f}", str(best)])
        spearman = own["spearman"].values()
        correlated.append([name, *(f"{one['rho']:+.2f} (p {one['p']:.2g})" for one in spearman)])
    features = list(next(iter(record["optimizers"].values()))["spearman"])
    return (
        markdown(["", "learning rate", "accuracy, %: median (quartiles)", "least", "best in cells"], rows)
        + f"\n\n{len(connected)} connected cells, one seed, the rate with the best mean of three. "
        "A tie counts for each optimizer in it.\n\n"
        + markdown(["rank correlation with accuracy", *features], correlated)
        + f"\n\n{record['machine']['cpu']}, torch {record['versions']['torch']}. `{record['command']}`"
    )


TABLES: dict[str, Callable[..., str]] = {
    "sweep": sweep,
    "rates": rates,
    "versus": versus,
    "gsnr": gsnr,
    "speed": speed,
    "partitions": partitions,
    "cells": cells,
    "sharded_memory": sharded_memory,
    "sharded_steps": sharded_steps,
}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rewritten(text: str) -> str:
    """The text with every table as its record has it.

    Raises:
        UserError: for an unknown kind of table, or one without a record.
    """

    def table(match: re.Match[str]) -> str:
        kind, names = match["kind"], match["records"].split()
        paths = [RESULTS / f"{name}.json" for name in names]
        missing = [path.name for path in paths if not path.exists()]
        if kind not in TABLES or missing:
            what = f"must be one of {', '.join(TABLES)}" if kind not in TABLES else f"needs {', '.join(missing)}"
            raise UserError(f"table: {kind} {match['records']}: {kind} {what}")
        read = read_results if kind in ("sweep", "rates", "versus", "partitions") else _read
        return f"{match['start']}{TABLES[kind](*map(read, paths))}\n{match['end']}"

    block = r"(?P<start><!-- table: (?P<kind>\w+) (?P<records>[\w ]+) -->\n).*?(?P<end><!-- end -->)"
    return re.sub(block, table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table disagrees")
    check = parser.parse_args().check
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            changed.append(page.name)
            if not check:
                write_text(page, new)
    if check and changed:
        sys.exit(f"{', '.join(changed)} differ from recipes/results: run this without --check")


if __name__ == "__main__":
    run_main(main)
