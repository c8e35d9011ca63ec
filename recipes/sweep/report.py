"""What a sweep found: its results read and checked, the best points, and figures of them.

    python -m recipes.sweep.report RESULTS.json ... --output FIGURE.png

puts several sweeps in one figure of optimizer state bytes against the best value (the Pareto front is drawn).
"""

from __future__ import annotations

from recipes.common.start import run_main

import argparse
import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.common.errors import UserError
from recipes.common.files import write_bytes
from recipes.common.provenance import check_sealed, origins


def read_results(path: Path) -> dict[str, Any]:
    """The results of a sweep, each row checked against its digest and the best points taken from the rows.

    Raises:
        UserError: no such results, or a row that was edited; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [*content["runs"], *content["finals"]]
        if not all("key" in row for row in rows):
            raise KeyError("key")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"results: {path} is not what recipes/sweep/run.py writes ({error!r}); remove it or name another"
        ) from error
    for row in rows:
        check_sealed(row, f"results: {path}")
    best, seeds = best_points(content["runs"], content["metric"]), over_seeds(content["finals"])
    return {**content, "best": best, "over_seeds": seeds, "origins": origins(rows)}


def best_points(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """Of each optimizer the point with the best mean over its seeds: name -> point, value, at_edge (the axes at whose
    end it lies, where a better one may lie outside)."""
    best: dict[str, dict[str, Any]] = {}
    worst = -math.inf if larger_is_better(metric) else math.inf
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        points: dict[str, list[float]] = {}
        for row in own:
            value = row["value"] if row["value"] is not None else worst
            points.setdefault(json.dumps(row["point"], sort_keys=True), []).append(value)
        means = {key: statistics.fmean(values) for key, values in points.items()}
        chosen = (max if larger_is_better(metric) else min)(means, key=lambda key: means[key])
        point = next(row["point"] for row in own if json.dumps(row["point"], sort_keys=True) == chosen)
        best[name] = {"point": point, "value": means[chosen], "at_edge": _edges(point, own)}
    return best


def _edges(point: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes of numbers at whose smallest or largest value the point is."""
    tried = {axis: {row["point"][axis] for row in rows} for axis, x in point.items() if isinstance(x, int | float)}
    return [axis for axis, values in tried.items() if len(values) > 1 and point[axis] in (min(values), max(values))]


def over_seeds(finals: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each optimizer's runs at length how many there are, their mean, least and largest; None where one diverged."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["run"] for row in finals):
        values = [row["value"] for row in finals if row["run"] == name]
        figures = [None] * 3 if None in values else [statistics.fmean(values), min(values), max(values)]
        found[name] = {"seeds": len(values), **dict(zip(("mean", "min", "max"), figures, strict=True))}
    return found


def show(content: Mapping[str, Any]) -> None:
    """Print the best point of each optimizer, and its mean and range over the seeds at length."""
    for name, best in content["best"].items():
        edge = f", at the edge of {', '.join(best['at_edge'])}" if best["at_edge"] else ""
        seeds = content["over_seeds"].get(name)
        spread = ""
        if seeds is not None:
            figures = "diverged" if seeds["mean"] is None else "{mean:.4f} ({min:.4f} to {max:.4f})".format(**seeds)
            spread = f"; {seeds['seeds']} seed{'s' * (seeds['seeds'] > 1)}: {figures}"
        print(f"best {name:20} {best['point']} {best['value']:.4f}{edge}{spread}")
    if content["origins"]:
        print(content["origins"])


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display
    return figure


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())


def curves(rows: Sequence[Mapping[str, Any]], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Of each run the mean over seeds and the other axes' best, by the value on `axis`; diverged points left out."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["value"] is not None and axis in row["point"]:
            found.setdefault(row["run"], {}).setdefault(float(row["point"][axis]), []).append(row["value"])
    return {
        name: [(x, sum(values) / len(values)) for x, values in sorted(points.items())] for name, points in found.items()
    }


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Metric over the learning rate, and its spread over the grid; with a second axis a heat map of each optimizer."""
    rows, metric = content["runs"], content["metric"]
    names = list(dict.fromkeys(row["run"] for row in rows))
    axes = list(dict.fromkeys(axis for row in rows for axis in row["point"]))
    numbers = {axis for row in rows for axis, value in row["point"].items() if isinstance(value, int | float)}
    second = [axis for axis in axes if axis != "learning_rate" and axis in numbers]
    lines = math.ceil(len(names) / _MAPS) if second else 0
    figure = _figure(11, 4.2 + 2.2 * lines)
    cells = figure.add_gridspec(1 + lines, _MAPS, height_ratios=[4.2, *[2.2] * lines])
    over, spread = figure.add_subplot(cells[0, : _MAPS // 2]), figure.add_subplot(cells[0, _MAPS // 2 :])
    colours = _colours(names)
    for name, points in curves(rows, "learning_rate").items():
        over.plot(*zip(*points, strict=True), marker="o", ms=4, color=colours[name], label=name)
    over.set_xscale("log")
    over.set_xlabel("learning rate, each in its own units")
    over.set_ylabel(metric)
    over.set_title("colours as on the right", fontsize=9)  # a legend would cover curves
    over.grid(alpha=0.3)
    values = [[row["value"] for row in rows if row["run"] == name and row["value"] is not None] for name in names]
    style = {"medianprops": {"color": "black"}, "patch_artist": True}
    boxes = spread.boxplot(values, orientation="horizontal", whis=(0, 100), **style)["boxes"]
    key = {"transform": spread.get_yaxis_transform(), "clip_on": False, "marker": "s", "zorder": 3}  # on the frame
    for place, (name, box) in enumerate(zip(names, boxes, strict=True), 1):
        box.set_facecolor((colours[name], 0.6))  # lighter than the line of the median
        spread.plot([0], [place], color=colours[name], **key)
    spread.set_yticks(range(1, len(names) + 1), names)
    spread.invert_yaxis()
    spread.set_xlabel(f"{metric} over the whole grid (diverged runs left out)")
    spread.grid(alpha=0.3)
    if second:
        panels = [figure.add_subplot(cells[1 + i // _MAPS, i % _MAPS]) for i in range(len(names))]
        _heat_maps(panels, rows, names, second[0], larger_is_better(metric))
    _save(figure, path)


_MAPS = 4  # in a line


def _heat_maps(
    panels: Sequence[Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str], second: str, share: bool
) -> None:
    values = [row["value"] for row in rows if row["value"] is not None]
    middle = (min(values, default=0.0) + max(values, default=0.0)) / 2
    for number, (panel, name) in enumerate(zip(panels, names, strict=True)):
        own = [row for row in rows if row["run"] == name]
        xs = sorted({row["point"]["learning_rate"] for row in own})
        ys = sorted({row["point"][second] for row in own})
        grid = [[math.nan] * len(xs) for _ in ys]
        for row in own:
            if row["value"] is not None:
                grid[ys.index(row["point"][second])][xs.index(row["point"]["learning_rate"])] = row["value"]
        panel.imshow(grid, vmin=min(values), vmax=max(values), aspect="auto", cmap="viridis")
        panel.set_xticks(range(len(xs)), [f"{x:g}" for x in xs], fontsize=7)
        panel.set_yticks(range(len(ys)), [f"{y:g}" for y in ys], fontsize=7)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("learning rate", fontsize=8)
        if number % _MAPS == 0:
            panel.set_ylabel(second, fontsize=8)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                text = "div." if math.isnan(value) else f"{100 * value:.0f} %" if share else f"{value:.3g}"
                panel.text(x, y, text, ha="center", va="center", fontsize=7, color="k" if value > middle else "w")


def pareto(contents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Optimizer state bytes against the best value, a panel a sweep; runs that no other beats in both are joined."""
    figure = _figure(7.4 * len(contents), 5.4)
    panels = figure.subplots(1, len(contents), squeeze=False)
    colours = _colours(list(dict.fromkeys(name for content in contents for name in content["best"])))
    labelled = []
    for panel, content in zip(panels[0], contents, strict=True):
        larger = larger_is_better(content["metric"])
        points = []
        for name, best in content["best"].items():
            sizes = [r["optimizer_state_bytes"] for r in content["runs"] if r["run"] == name]
            if best["value"] is not None and math.isfinite(float(best["value"])):
                points.append((sizes[0] / 1e3, float(best["value"]), name))
        for size, value, name in points:
            panel.scatter([size], [value], color=colours[name], s=30)
        front = pareto_front([(s, -v if larger else v) for s, v, _ in points])
        panel.plot([points[i][0] for i in front], [points[i][1] for i in front], color="0.6", lw=1, ls="--", zorder=0)
        panel.set_xlabel("optimizer state, kB")
        panel.set_ylabel(f"{content['metric']} at the best learning rate")
        panel.set_title(content["sweep"].removesuffix(".yaml"), fontsize=9)
        panel.margins(0.12)
        panel.grid(alpha=0.3)
        labelled.append((panel, points, [points[i][:2] for i in front]))
    figure.draw_without_rendering()  # labels are placed in pixels, so the panels must stay where they are
    figure.set_layout_engine("none")
    for panel, points, line in labelled:
        _label_points(panel, points, line)
    _save(figure, path)


# Where a label may stand, nearest first: points from the mark to the label's nearest edge or corner.
_PLACES = [
    (distance * x, distance * y)
    for distance in (5, 10, 16, 24, 34, 46, 60)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))
]


def _label_points(panel: Any, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]) -> None:
    """Write each point's name near it, inside the frame and off the points, the line and the other names."""
    from matplotlib.transforms import Bbox

    renderer = panel.figure.canvas.get_renderer()
    pixels = panel.transData.transform
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in (pixels((x, y)) for x, y, _ in points)]
    for (x, y), (to_x, to_y) in itertools.pairwise([pixels(point) for point in line]):
        parts = [(x + share * (to_x - x), y + share * (to_y - y)) for share in (i / 100 for i in range(101))]
        taken += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in parts]
    frame = panel.get_window_extent(renderer)
    for x, y, name in points:
        label = panel.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=7)
        for dx, dy in _PLACES:
            label.set_position((dx, dy))
            label.set_ha("left" if dx > 0 else "right" if dx < 0 else "center")
            label.set_va("bottom" if dy > 0 else "top" if dy < 0 else "center")
            box = label.get_window_extent(renderer).padded(1)
            inside = frame.containsx(box.x0) and frame.containsx(box.x1)
            inside = inside and frame.containsy(box.y0) and frame.containsy(box.y1)
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        if max(abs(dx), abs(dy)) > 5:
            stroke = {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkA": 0}
            panel.annotate("", (x, y), xytext=(dx, dy), textcoords="offset points", arrowprops=stroke)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each run; they repeat after the sixteenth."""
    return {name: _PALETTE[number % len(_PALETTE)] for number, name in enumerate(names)}


_PALETTE = (*(f"C{i}" for i in range(10)), "gold", "navy", "lime", "maroon", "teal", "peru")


def larger_is_better(metric: str) -> bool:
    """Whether a metric of this name, as `sweep.py` takes them, is an accuracy."""
    return metric.endswith(("accuracy", "top1", "top5"))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats in both coordinates (smaller is better), from left to right."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png")
    args = parser.parse_args()
    pareto([read_results(path) for path in args.results], args.output)
    print(args.output)


if __name__ == "__main__":
    run_main(main)
