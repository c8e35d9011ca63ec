"""Figures: loss curves of one or more runs, and the g-SNR of every block. matplotlib is imported on first use."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_sai.table import GSNRRow


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "Loss") -> Path:
    """Plot training loss (thin) and evaluation loss (thick, with markers) against the step, with one colour per run.

    Args:
        histories: maps the name of a run to its log, in the format of ``trainer.state.log_history``: mappings with
            ``step`` and ``loss`` or ``eval_loss``. Other entries and losses that are not finite are ignored.
        path: the image file to write. Its suffix determines the format (.png, .pdf, .svg).
        title: the title above the axes.

    Returns:
        The path, after the whole file has been written.

    Raises:
        ValueError: if no run has a finite loss.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    drawn = False
    for number, (name, history) in enumerate(histories.items()):
        for key, style in (("loss", {"linewidth": 0.8, "alpha": 0.6}), ("eval_loss", {"marker": "o", "markersize": 3})):
            points = [(log["step"], log[key]) for log in history if key in log and _is_finite(log[key])]
            if points:
                label = f"{_plain(name)}, {'training' if key == 'loss' else 'validation'}"
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, **style)
                drawn = True
    if not drawn:
        raise ValueError(f"no run has a finite loss to draw; runs: {', '.join(histories) or 'none'}")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_title(_plain(title))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, path)


def plot_gsnr(rows: "Sequence[GSNRRow]", path: str | Path) -> Path:
    """Plot the g-SNR of every calibrated block on a logarithmic axis, from top to bottom in the model's order.

    A mark shows sqrt(d), the g-SNR of a zero-mean gradient of d elements. A block to the right of its mark has a
    gradient whose mean is large compared to its noise.

    Args:
        rows: the result of :func:`hf_sai.gsnr_table`.
        path: the image file to write. Its suffix determines the format.

    Returns:
        The path, after the whole file has been written.

    Raises:
        ValueError: if no block is calibrated yet.
    """
    calibrated = [row for row in rows if row.calibrated]
    if not calibrated:
        raise ValueError("no block is calibrated yet: plot after the first optimizer step")
    named = len(calibrated) <= 100  # more names are not readable
    figure = _figure(9, max(2.5, 0.17 * len(calibrated) + 1) if named else 10)
    axes = figure.add_subplot()
    heights = range(len(calibrated))
    axes.scatter([math.sqrt(row.numel) for row in calibrated], heights, s=40, marker="|", color="0.5", label="sqrt(d)")
    axes.scatter([row.gsnr for row in calibrated], heights, s=14, label="g-SNR")
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("g-SNR of the first gradient")
    axes.set_ylim(len(calibrated) - 0.3, -0.7)
    axes.set_title(f"{len(calibrated)} of {len(rows)} blocks calibrated")
    if named:
        axes.set_yticks(heights, [_plain(row.name) for row in calibrated], fontsize=6)
    else:
        axes.set_ylabel("block, in the model's order")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return _save(figure, path)


def _plain(text: str) -> str:
    """Escape a label, so that dollars do not start math mode and a leading underscore does not hide it."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, or at every digit within one. Call it after drawing."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else range(1, 10)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        temporary = Path(folder) / path.name
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    return path
