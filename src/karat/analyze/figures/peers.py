"""Figure 1a: parameters against accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karat.analyze.peers import Point
from karat.plots import COLOURS, drawing, readable

MARKERS = "osD^vP"
LABEL_SIZE, LABEL_WIDTH, LABEL_HEIGHT = 5.5, 3.1, 6.0  # points; the width is that of one letter
# Where a label may lie beside its point: the corner or side it hangs on, and its offset in points.
PLACES = [(side, right, up) for up in (2, -7, 8, -13, 14, -19) for side, right in (("left", 4), ("right", -4))]


def draw_parameters_accuracy(measured: Sequence[Point], published: Sequence[Point]) -> Figure:
    """Measured models filled, one colour a data set, the published ones over them hollow, one marker a kind.

    Accuracies on different data sets don't compare; the legend names each one's. Raises ValueError if there is no
    point at all.
    """
    if not measured and not published:
        raise ValueError("there is no point to draw; give measured points or published ones")
    with drawing(7.0, 4.6) as (figure, axes):
        for number, data in enumerate(dict.fromkeys(point.dataset for point in measured)):
            chosen = [point for point in measured if point.dataset == data]
            colour = COLOURS[number % len(COLOURS)]
            _scatter(axes, chosen, f"measured, {data}", "o", facecolor=colour, edgecolor=colour)
        for number, kind in enumerate(dict.fromkeys(point.kind for point in published)):
            chosen = [point for point in published if point.kind == kind]
            data = ", ".join(dict.fromkeys(point.dataset for point in chosen))
            marker = MARKERS[number % len(MARKERS)]
            _scatter(axes, chosen, f"published, {data}: {kind}", marker, facecolor="none", edgecolor="0.45")
        axes.set(xscale="log", xlabel="parameters (M)", ylabel="top-1 (%)")
        axes.margins(0.12)
        axes.legend(fontsize=6)
        readable(figure)
        figure.draw_without_rendering()  # so that points have their places
        _label(axes, sorted([*measured, *published], key=lambda point: -point.top1))
    return figure


def _scatter(axes: Axes, points: Sequence[Point], label: str, marker: str, *, facecolor: str, edgecolor: str) -> None:
    sizes, accuracies = [point.params_M for point in points], [point.top1 for point in points]
    axes.scatter(
        sizes, accuracies, s=22, marker=marker, label=label, linewidth=0.9, facecolor=facecolor, edgecolor=edgecolor
    )


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Each point's name in the first place beside it, within the axes, that no other name or point has."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = 72 / figure.dpi
    centres = [axes.transData.transform((point.params_M, point.top1)) * scale for point in points]
    window = axes.get_window_extent()
    frame = window.x0 * scale, window.y0 * scale, window.x1 * scale, window.y1 * scale
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in centres]

    def crossings(box: tuple[float, ...]) -> int:
        return sum(_cross(box, other) for other in taken) + 3 * (box[0] < frame[0] or box[2] > frame[2])

    for point, (x, y) in zip(points, centres, strict=True):
        width = LABEL_WIDTH * len(point.label)
        boxes = []
        for side, right, up in PLACES:
            left = x + right - (width if side == "right" else 0)
            boxes.append((left, y + up, left + width, y + up + LABEL_HEIGHT))
        box = min(boxes, key=crossings)
        side, right, up = PLACES[boxes.index(box)]
        taken.append(box)
        place, offset = (point.params_M, point.top1), (right, up)
        axes.annotate(point.label, place, offset, textcoords="offset points", fontsize=LABEL_SIZE, ha=side)


def _cross(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
