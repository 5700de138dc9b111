"""Figure 1a: parameters against accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from karat.analyze.figures.style import COLOURS, looks, new_figure
from karat.analyze.peers import PUBLISHED, Point

MARKERS = "osD^vP"


def draw_parameters_accuracy(measured: Sequence[Point], published: Sequence[Point] = PUBLISHED) -> Figure:
    """Measured models filled, one colour a data set, the published ones over them hollow, one marker a kind.

    Accuracies on different data sets don't compare; the legend names each one's. Raises ValueError if there is no
    point at all.
    """
    if not measured and not published:
        raise ValueError("there is no point to draw; give measured points or published ones")
    with looks():
        figure = new_figure(7.0, 4.6)
        axes = figure.subplots()
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
    return figure


def _scatter(axes, points: Sequence[Point], label: str, marker: str, **colours: str) -> None:  # type: ignore[no-untyped-def]
    sizes, accuracies = [point.params_M for point in points], [point.top1 for point in points]
    axes.scatter(sizes, accuracies, s=22, marker=marker, label=label, linewidth=0.9, **colours)
    for point in points:
        place = (point.params_M, point.top1)
        axes.annotate(point.label, place, (4, 2), textcoords="offset points", fontsize=5.5)
