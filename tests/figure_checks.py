"""What every figure must hold: legends stand beside the panels, texts inside the frame and off one another."""

import itertools
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def faults(figure: Figure) -> list[str]:
    """A line for each text or legend that covers something or is cut off; none where the figure is right."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    found = []
    legends = [("a legend", one.get_window_extent(renderer)) for one in _legends(figure)]
    for axes in figure.axes:
        frame = axes.get_window_extent(renderer)
        found += [f"{name} stands in a panel" for name, box in legends if box.overlaps(frame)]
        marks = [
            axes.transData.transform(xy) for line in axes.lines if line.get_marker() != "s" for xy in line.get_xydata()
        ]
        marks += [xy for dots in axes.collections for xy in dots.get_offset_transform().transform(dots.get_offsets())]
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            if text.get_text() and not (box.padded(-1).x0 >= frame.x0 and box.x1 <= frame.x1 + 1):
                found.append(f"{text.get_text()!r} leaves its panel at a side")
            if text.get_text() and not (box.padded(-1).y0 >= frame.y0 and box.y1 <= frame.y1 + 1):
                found.append(f"{text.get_text()!r} leaves its panel above or below")
            found += [f"{text.get_text()!r} covers a mark" for x, y in marks if text.get_text() and box.contains(x, y)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in _texts(figure)]
    for name, box in boxes + legends:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"{name!r} is cut off")
    level = [
        (text.get_text(), text.get_window_extent(renderer)) for text in _texts(figure) if text.get_rotation() % 90 == 0
    ]
    for (one, box), (other, beside) in itertools.combinations(level + legends, 2):
        if box.padded(-1).overlaps(beside.padded(-1)):
            found.append(f"{one!r} and {other!r} overlap")
    return found


def line_colours(axes: Any) -> list[str]:
    return [str(line.get_color()) for line in axes.lines]


def _legends(figure: Figure) -> list[Any]:
    return [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]


def _texts(figure: Figure) -> list[Any]:
    """All that are drawn and not blank."""
    texts = [*figure.texts, *([figure._suptitle] if figure._suptitle else [])]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            scale = axis.get_transform().transform
            low, high = sorted(scale(axis.get_view_interval()))
            slack = 1e-6 * (high - low)
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [tick.label1 for tick in ticks if low - slack <= scale(tick.get_loc()) <= high + slack]
            texts.append(axis.get_offset_text())
    unique = {id(text): text for text in texts}
    return [text for text in unique.values() if text.get_visible() and text.get_text().strip()]
