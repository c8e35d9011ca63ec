"""Benchmark results as a table to print, as JSON and as a chart."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_sai.bench.measure import Result, Row
from hf_sai.bench.paper import A100, TABLES_1_AND_3, TABLES_5_AND_6
from hf_sai.bench.rivals import RIVALS

_BASELINES = ("adamw_fused", "sgd_fused", "sgd_sai_authors")


def table(result: Result) -> str:
    """A result as text: our figures, then the paper's figures for the same row, marked as from another machine."""
    by_key = {row.optimizer: row for row in result.rows}
    ratios = [key for key in _BASELINES if key in by_key and by_key[key].step_ms]
    head = ["optimizer", "step ms", "quartiles", "first", "less alloc", "state GB", "peak GB", "of copy"]
    head += [f"/ {key}" for key in ratios]
    in_paper = any(_paper(result, row.optimizer) for row in result.rows)
    head += [f"ms ({A100})", f"GB ({A100})"] if in_paper else []
    lines = [head]
    for row in result.rows:
        if row.step_ms is None:
            lines.append([row.title, row.error or "not measured"])
            continue
        low, high = row.quartiles_ms or (row.step_ms, row.step_ms)
        line = [
            row.title,
            f"{row.step_ms:.2f}",
            f"{low:.2f} to {high:.2f}",
            _number(row.first_step_ms, "{:.1f}"),
            _number(row.first_step_less_allocation_ms, "{:.1f}"),
            _gigabytes(row.state_bytes),
            _gigabytes(row.peak_bytes),
            _number(row.of_copy, "{:.0%}"),
        ]
        line += [f"{row.step_ms / by_key[key].step_ms:.2f}" for key in ratios]  # type: ignore[operator]
        reported = _paper(result, row.optimizer)
        if reported:
            line += ["out of memory" if reported.step_ms is None else f"{reported.step_ms:g} ± {reported.spread_ms:g}"]
            line += [f"{reported.state_gb:g}"]
        lines.append(line)
    title = (
        f"{result.title}: {result.parameters:,} parameters in {result.tensors} tensors, {result.dtype}, {result.device}"
        + (f", {result.threads} threads" if result.device == "cpu" else "")
        + f"; copy {result.copy_gb_per_s:.0f} GB/s; optimizers run {'in turn' if result.in_turn else 'one by one'}"
    )
    return title + "\n" + _columns(lines) + _calibration_note(result)


def write_json(path: str | Path, results: Sequence[Result], **conditions: Any) -> Path:
    """Write the results and their conditions atomically."""
    content = {"benchmark": "optimizer step", **conditions, "results": [r.as_json() for r in results]}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _written(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def chart(path: str | Path, results: Sequence[Result]) -> Path:
    """Plot step time and state of each optimizer, with one row per model. The suffix of ``path`` sets the format."""
    from matplotlib.figure import Figure

    results = [r for r in results if any(row.step_ms for row in r.rows)]
    if not results:
        raise ValueError("no optimizer was measured, so there is nothing to draw")
    height = sum(1.2 + 0.28 * len(r.rows) for r in results)
    figure = Figure(figsize=(12, height), layout="constrained")
    ratios = [len(r.rows) + 3 for r in results]
    panels = figure.subplots(len(results), 2, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for (times, states), result in zip(panels, results, strict=True):
        rows = [row for row in result.rows if row.step_ms][::-1]
        colours = ["C1" if row.optimizer.startswith("sgd_sai") else "C0" for row in rows]
        _bars(times, rows, [row.step_ms or 0.0 for row in rows], colours, "ms a step")
        _bars(states, rows, [(row.state_bytes or 0) / 1e9 for row in rows], colours, "GB of state")
        states.set_yticklabels([])
        times.set_title(f"{result.title}, {result.dtype}, {result.device}", loc="left")
    suffix = Path(path).suffix.lstrip(".") or "png"
    return _written(path, lambda temporary: figure.savefig(temporary, format=suffix))


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float], colours: Sequence[str], label: str) -> None:
    bars = axes.barh([row.title for row in rows], values, color=colours)
    axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", padding=3)
    axes.set_xlabel(label)
    axes.margins(x=0.2)


def _paper(result: Result, optimizer: str) -> Any:
    name = RIVALS[optimizer].in_paper
    return TABLES_1_AND_3.get((result.model, name)) if name and result.dtype == "float32" else None


def _calibration_note(result: Result) -> str:
    """The paper's step and calibration times from Tables 5 and 6, with their machines."""
    lines = []
    for name in ("SGDM", "SGD-SaI"):
        for row in TABLES_5_AND_6.get((result.model, name), []):
            lines.append(
                f"  {row.machine}, paper: {name} step {row.step_ms:g} ms"
                + (f", g-SNR calculation {row.calibration_ms:g} ms" if row.calibration_ms else "")
            )
    return "\n" + "\n".join(lines) if lines and result.dtype == "float32" else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.3f}"


def _columns(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines if len(line) > max(i, 2)) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(widths[i]) if i == 0 or len(line) == 2 else text.rjust(widths[i]) for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    )


def _written(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Write under a temporary name in the same folder, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
