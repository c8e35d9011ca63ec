"""Figures of a g-SNR record: by kind of block, over time, and the drift of the scales (the paper's Figures 3 and 4)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sai.blocks import KINDS
from hf_sai.plots import _figure, _plain, _plain_ticks, _save

_COLOURS = {kind: f"C{i}" for i, kind in enumerate(KINDS[:10])} | dict(
    zip(KINDS[10:], ("0.3", "black", "0.6"), strict=True)
)
# The lines of many kinds coincide. Lines that are drawn first are wider, so that they stay visible under the others.
_WIDTHS = {kind: 5.0 - 0.4 * i for i, kind in enumerate(KINDS)}
# Over time, the lines of two kinds of the same size coincide, so every second kind has a dashed line.
_STYLES = {kind: ("-", (0, (6, 3)))[i % 2] for i, kind in enumerate(KINDS)}


def plot_kinds(blocks: Sequence[Mapping[str, Any]], path: str | Path, title: str = "g-SNR by kind of block") -> Path:
    """Plot the g-SNR of every block above its kind (the paper's Figure 3), and next to it g-SNR / sqrt(d).

    The colour shows the layer, from the first (dark) to the last (light). A cross is a block outside the layers.

    Args:
        blocks: mappings with ``kind``, ``layer``, ``numel`` and ``gsnr``, like those of a record. A block whose
            ``gsnr`` is ``None`` is ignored.
        path: the image file to write. Its suffix determines the format (.png, .pdf, .svg).
        title: the title above the axes.

    Returns:
        The path, after the whole file has been written.

    Raises:
        ValueError: if no block has a g-SNR.
    """
    blocks = [block for block in blocks if block["gsnr"] is not None]
    if not blocks:
        raise ValueError("no block has a g-SNR to draw")
    kinds = [kind for kind in KINDS if any(block["kind"] == kind for block in blocks)]
    deepest = max((block["layer"] for block in blocks if block["layer"] is not None), default=0)
    figure = _figure(12, 5)
    axes = figure.subplots(1, 2)
    inside = None
    for panel, value in zip(axes, (_gsnr, _to_sqrt), strict=True):
        for mark, chosen in (
            ("x", [b for b in blocks if b["layer"] is None]),
            ("o", [b for b in blocks if b["layer"] is not None]),
        ):
            offsets = [kinds.index(b["kind"]) + _aside(b["layer"], deepest) for b in chosen]
            values = [value(b) for b in chosen]
            if mark == "x":
                panel.scatter(offsets, values, marker="x", s=36, color="C3", label="outside the layers")
            else:
                layers = [b["layer"] for b in chosen]
                inside = panel.scatter(offsets, values, s=22, c=layers, cmap="viridis", vmin=0, vmax=max(deepest, 1))
        panel.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        panel.set_xlim(-0.6, len(kinds) - 0.4)
        panel.grid(alpha=0.3)
    roots = [(kinds.index(b["kind"]) + _aside(b["layer"], deepest), math.sqrt(b["numel"])) for b in blocks]
    axes[0].scatter(*zip(*roots, strict=True), marker="_", s=90, color="0.5", label="sqrt(d)", zorder=0)
    axes[0].set_yscale("log")
    _plain_ticks(axes[0].yaxis)
    axes[0].set_ylabel("g-SNR")
    axes[1].axhline(1.0, color="0.5", lw=1)
    axes[1].set_ylabel("g-SNR / sqrt(d)")
    if inside is not None and deepest:
        figure.colorbar(inside, ax=axes[1], label="layer", format="%d", ticks=range(0, deepest + 1, 1 + deepest // 12))
    figure.suptitle(_plain(title))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, path)


def plot_over_time(record: Mapping[str, Any], path: str | Path) -> Path:
    """Plot g-SNR against the step for a shallow, a middle and a deep layer, and other blocks (the paper's Figure 4).

    The panels below show g-SNR / sqrt(d) of the same blocks. There is one line per block and one colour per kind.

    Args:
        record: a record of :class:`hf_sai.GSNRCallback`.
        path: the image file to write. Its suffix determines the format.

    Returns:
        The path, after the whole file has been written.

    Raises:
        ValueError: if the record has no measurement.
    """
    _check(record)
    layers = sorted({block["layer"] for block in record["blocks"] if block["layer"] is not None})
    columns: list[tuple[str, int | None]] = []
    if layers:
        for word, layer in (("shallow", layers[0]), ("middle", layers[(len(layers) - 1) // 2]), ("deep", layers[-1])):
            if all(layer != other for _, other in columns):
                columns.append((f"{word}: layer {layer}", layer))
    if any(block["layer"] is None for block in record["blocks"]):
        columns.append(("outside the layers", None))
    figure = _figure(3.7 * len(columns) + 1, 7)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    labels: dict[str, Any] = {}
    for column, (title, layer) in enumerate(columns):
        for block in (block for block in record["blocks"] if block["layer"] == layer):
            points = [(s, x) for s, x in zip(record["steps"], block["gsnr_now"], strict=True) if x is not None]
            steps, values = zip(*points, strict=True)
            root = math.sqrt(block["numel"])
            kind = block["kind"]
            style = {"color": _COLOURS[kind], "ls": _STYLES[kind], "lw": 0.7 * _WIDTHS[kind], "alpha": 0.85}
            axes[0][column].plot(steps, values, **style)
            (labels[kind],) = axes[1][column].plot(steps, [x / root for x in values], **style)
        axes[0][column].set_title(title)
        axes[1][column].set_xlabel("optimizer step")
    axes[0][0].set_yscale("log")
    _plain_ticks(axes[0][0].yaxis)
    axes[0][0].set_ylabel("g-SNR")
    axes[1][0].set_ylabel("g-SNR / sqrt(d)")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    kinds = [kind for kind in KINDS if kind in labels]
    figure.legend([labels[kind] for kind in kinds], kinds, loc="outside right center")
    return _save(figure, path)


def plot_drift(record: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the drift of each kind: the scale that a re-calibration at a step would give, divided by the current scale.

    The left panel shows the whole drift. The right panel removes the common factor of all blocks (their geometric
    mean), which the learning rate could compensate for. A line is the median of the kind's blocks, and the band is
    their range.

    Args:
        record: a record of :class:`hf_sai.GSNRCallback`.
        path: the image file to write. Its suffix determines the format.

    Returns:
        The path, after the whole file has been written.

    Raises:
        ValueError: if the record has no drift, because the optimizer was not SGDSaI.
    """
    _check(record)
    blocks = [block for block in record["blocks"] if block["drift"] is not None]
    if not blocks:
        raise ValueError("the record has no drift: it is from an optimizer without scales")
    common = common_drift(record)
    figure = _figure(12, 5)
    panels = figure.subplots(1, 2)
    for kind in KINDS:
        members = [block["drift"] for block in blocks if block["kind"] == kind]
        for panel, factors in zip(panels, ([1.0] * len(common), common), strict=True):
            rows = [
                (step, [drift[i] / factors[i] for drift in members if drift[i] is not None])
                for i, step in enumerate(record["steps"])
            ]
            rows = [(step, values) for step, values in rows if values]
            if rows:
                steps = [step for step, _ in rows]
                low, high = [min(v) for _, v in rows], [max(v) for _, v in rows]
                panel.plot(
                    steps, [statistics.median(v) for _, v in rows], color=_COLOURS[kind], label=kind, lw=_WIDTHS[kind]
                )
                panel.fill_between(steps, low, high, color=_COLOURS[kind], alpha=0.15, lw=0)
    for panel, title in zip(
        panels, ("re-calibrated scale / kept scale", "the same, over its mean over blocks"), strict=True
    ):
        panel.axhline(1.0, color="0.5", lw=1, zorder=0)
        panel.set_ylim(bottom=0.0)
        panel.set_xlabel("optimizer step")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return _save(figure, path)


def common_drift(record: Mapping[str, Any]) -> list[float]:
    """The geometric mean of the drift over blocks at each step, or 1.0 if no block has a drift."""
    means = []
    for i in range(len(record["steps"])):
        logs = [math.log(b["drift"][i]) for b in record["blocks"] if b["drift"] and b["drift"][i]]
        means.append(math.exp(statistics.fmean(logs)) if logs else 1.0)
    return means


def _check(record: Mapping[str, Any]) -> None:
    if not record["steps"] or not record["blocks"]:
        raise ValueError("the record has no measurement: the run ended before its first optimizer step")


def _gsnr(block: Mapping[str, Any]) -> float:
    return float(block["gsnr"])


def _to_sqrt(block: Mapping[str, Any]) -> float:
    return float(block["gsnr"]) / math.sqrt(block["numel"])


def _aside(layer: int | None, deepest: int) -> float:
    """The horizontal offset of a block: the layers of a kind are side by side, and other blocks are to their left."""
    return -0.33 if layer is None else -0.2 + 0.5 * layer / max(deepest, 1)
