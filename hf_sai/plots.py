"""Figures: loss curves of one or more runs, and the g-SNR of every block. matplotlib is loaded when one is drawn."""

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
    """Draw training loss (thin) and evaluation loss (thick, with marks) against the step, one colour a run.

    Args:
        histories: a run's name -> its log as ``trainer.state.log_history`` has it: mappings with ``step`` and ``loss``
            or ``eval_loss``; entries with neither, and losses that are not finite, are left out.
        path: the image to write; its suffix says the format (.png, .pdf, .svg).
        title: above the axes.

    Returns:
        The path, once the whole file is there.

    Raises:
        ValueError: when no run has a loss to draw.
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
    """Draw the g-SNR of every calibrated block, in the model's order from the top, on a logarithmic axis.

    A mark shows sqrt(d), the g-SNR of a zero-mean gradient of d elements: a block to its right has a gradient with
    a mean that stands out of its noise.

    Args:
        rows: what :func:`hf_sai.gsnr_table` returns.
        path: the image to write; its suffix says the format.

    Returns:
        The path, once the whole file is there.

    Raises:
        ValueError: when no block is calibrated yet.
    """
    calibrated = [row for row in rows if row.calibrated]
    if not calibrated:
        raise ValueError("no block is calibrated yet: plot after the first optimizer step")
    named = len(calibrated) <= 100  # more names than that cannot be read
    figure = _figure(9, max(2.5, 0.17 * len(calibrated) + 1) if named else 10)
    axes = figure.add_subplot()
    places = range(len(calibrated))
    axes.scatter([math.sqrt(row.numel) for row in calibrated], places, s=40, marker="|", color="0.5", label="sqrt(d)")
    axes.scatter([row.gsnr for row in calibrated], places, s=14, label="g-SNR")
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("g-SNR of the first gradient")
    axes.set_ylim(len(calibrated) - 0.3, -0.7)
    axes.set_title(f"{len(calibrated)} of {len(rows)} blocks calibrated")
    if named:
        axes.set_yticks(places, [_plain(row.name) for row in calibrated], fontsize=6)
    else:
        axes.set_ylabel("block, in the model's order")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return _save(figure, path)


def _plain(text: str) -> str:
    """A label shown as it is: no mathematics between dollars, none left out for a leading underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis, once all is drawn, in full at 1, 2 and 5 of each decade; at every digit within one."""
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
