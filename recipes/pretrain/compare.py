"""Several runs on one page: `python -m recipes.pretrain.compare RECORD.json ... --output FOLDER`.

Reads the `record.json` files that `recipes.pretrain` writes and leaves comparison.md, comparison.html (one file, images
inside) and the figures: the loss curves over tokens and over time, the optimizer's time in a step, its memory. That is
Figure 8 of the paper for any set of runs.
"""

from __future__ import annotations

from recipes.common.start import run_main

import argparse
import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.errors import UserError
from recipes.common.files import write_bytes, write_text
from recipes.common.records import label, markdown_text
from recipes.pretrain.report import draw_costs, draw_curves

HEADER = (
    *("run", "tokens", "train loss", "validation loss", "perplexity", "optimizer state, MiB"),
    *("step, ms", "optimizer, ms", "tokens/s", "peak memory, MiB", "training, s"),
)

INCIDENTAL = ("cache_dir", "disable_tqdm", "do_eval", "logging_steps", "eval_steps", "save_steps", "save_strategy")


def read_record(path: str | Path) -> dict[str, Any]:
    """A run record, checked for what the page needs."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} must be a run record in JSON: {error}") from error
    needed = ("config", "curves", "final", "speed", "tokens", "optimizer_state_bytes")
    missing = [key for key in needed if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"{path} must be a record of recipes.pretrain, but lacks {', '.join(missing)}")
    try:
        label(record)
        for split in ("train", "validation"):
            for row in record["curves"][split]:
                # JSON has no NaN: a diverged loss was written as a word
                row.update({key: float(row[key]) for key in ("tokens", "seconds", "loss")})
        table_row("", record)
        _conditions([record])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}; run the recipe again") from error
    return record


def unique_labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The label of each run; runs that would share one get a number."""
    labels = [label(record) for record in records]
    return [
        f"{name} ({labels[: i + 1].count(name)})" if labels.count(name) > 1 else name for i, name in enumerate(labels)
    ]


def _number(value: Any, digits: int = 1) -> str:
    try:
        value = float(value)
    except (TypeError, ValueError):
        return "-"
    if not math.isfinite(value):
        return "diverged"
    return f"{value:,.{digits}f}"


def table_row(name: str, record: Mapping[str, Any]) -> list[str]:
    """The cells of one run, in the order of `HEADER`."""
    final, speed = record["final"], record["speed"]
    step = _number(speed.get("step_ms"))
    if "step_ms_quartiles" in speed:
        step += " ({} to {})".format(*(_number(value) for value in speed["step_ms_quartiles"]))
    optimizer = _number(speed.get("optimizer_ms"), 2)
    if "optimizer_share" in speed:
        optimizer += f" ({100 * speed['optimizer_share']:.1f} %)"
    return [
        name,
        f"{record['tokens']:,}",
        _number(final.get("train_loss"), 3),
        _number(final.get("eval_loss"), 3),
        _number(final.get("eval_perplexity"), 1),
        _number(record["optimizer_state_bytes"] / 2**20, 2),
        step,
        optimizer,
        _number(speed.get("tokens_per_second"), 0),
        _number(record.get("peak_memory_bytes", math.nan) / 2**20, 0),
        _number(record.get("train_seconds")),
    ]


def shared_settings(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The settings that all runs have in common, and the names of those that differ."""
    keys = sorted({key for record in records for key in record["config"]})
    values = {key: [record["config"].get(key) for record in records] for key in keys}
    same = {key: found[0] for key, found in values.items() if all(value == found[0] for value in found)}
    shown = {key: value for key, value in same.items() if value not in (None, False, [], {}) and key not in INCIDENTAL}
    return shown, [key for key in keys if key not in same and key not in INCIDENTAL]


def _conditions(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The distinct machines and versions, one line each: step times compare within a machine only."""
    lines = []
    for record in records:
        machine, versions = record.get("machine", {}), record.get("versions", {})
        hardware = ", ".join(machine.get("gpus", [])) or f"{machine.get('cpu')}, {machine.get('torch_threads')} threads"
        packages = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "hf_sai") if name in versions
        )
        lines.append(f"{hardware}; {packages}; {record.get('processes', 1)} process(es)")
    return list(dict.fromkeys(lines))


@dataclass
class Page:
    """What both forms of the page hold. `figures` maps a file name to a title and the PNG."""

    title: str
    rows: list[list[str]]
    figures: dict[str, tuple[str, bytes]]
    shared: dict[str, Any]
    differing: list[str]
    conditions: list[str]

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"

        align = "|---" + "|---:" * (len(HEADER) - 1) + "|"
        parts = [f"# {markdown_text(self.title)}", "\n".join([line(HEADER), align, *map(line, self.rows)])]
        parts += [f"![{markdown_text(title)}]({name})" for name, (title, _) in self.figures.items()]
        parts.append("\n".join(f"- {markdown_text(text)}" for text in self.notes()))
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        images = "\n".join(
            f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            f"<figcaption>{html.escape(title)}</figcaption></figure>"
            for title, png in self.figures.values()
        )
        body = "\n".join(row(cells, "td") for cells in self.rows)
        notes = "\n".join(f"<li>{html.escape(text)}</li>" for text in self.notes())
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(self.title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
figure {{ margin: 1.5rem 0; }}
</style>
</head>
<body>
<h1>{html.escape(self.title)}</h1>
<div><table>
<thead>{row(HEADER, "th")}</thead>
<tbody>
{body}
</tbody>
</table></div>
{images}
<ul>
{notes}
</ul>
</body>
</html>
"""

    def notes(self) -> list[str]:
        settings = ", ".join(f"{key} {value}" for key, value in self.shared.items())
        return [
            "Seconds are seconds of training, evaluation left out. Step: median and quartiles; optimizer: its part of "
            "the step. Both compare within one machine only.",
            *(f"Machine: {text}" for text in self.conditions),
            f"The same in all runs: {settings or 'nothing'}",
            f"Different: {', '.join(self.differing) or 'nothing'}",
        ]


def compare(paths: Sequence[str | Path], output: str | Path, title: str = "Comparison of runs") -> Path:
    """Write comparison.md, comparison.html and their figures to the folder `output`, and return it.

    Raises:
        UserError: a file is missing or no record of a pretraining run.
    """
    if not paths:
        raise UserError("give at least one record.json")
    records = [read_record(path) for path in paths]
    labels = unique_labels(records)
    figures = {}
    for name, caption, draw in (
        ("curves.png", "Loss over tokens and over time", draw_curves),
        ("costs.png", "What the optimizer costs in a step, and in memory", draw_costs),
    ):
        stream = io.BytesIO()
        draw(records, stream, labels)
        figures[name] = (caption, stream.getvalue())
    shared, differing = shared_settings(records)
    rows = [table_row(name, record) for name, record in zip(labels, records, strict=True)]
    page = Page(title, rows, figures, shared, differing, _conditions(records))
    output = Path(output)
    for name, (_, png) in figures.items():
        write_bytes(output / name, png)
    write_text(output / "comparison.md", page.markdown())
    write_text(output / "comparison.html", page.html())
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="RECORD.json")
    parser.add_argument("--output", default="outputs/comparison", help="folder for the page and its figures")
    parser.add_argument("--title", default="Comparison of runs")
    args = parser.parse_args()
    print(compare(args.records, args.output, args.title) / "comparison.html")


if __name__ == "__main__":
    run_main(main)
