"""Figure 1a: parameters against accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from karat.analyze.figures.style import COLOURS, looks, new_figure
from karat.analyze.peers import PUBLISHED, Point


def draw_parameters_accuracy(measured: Sequence[Point], published: Sequence[Point] = PUBLISHED) -> Figure:
    """Measured points on the left, one colour a data set; published ones on the right, one colour a kind.

    Two panels, because small models on small images and ImageNet models share neither axis. A panel without points is
    left out. Raises ValueError if there is no point at all.
    """
    panels = [
        (title, points, by)
        for title, points, by in (
            ("measured", measured, "dataset"),
            ("published, ImageNet-1K", published, "kind"),
        )
        if points
    ]
    if not panels:
        raise ValueError("there is no point to draw; give measured points or published ones")
    with looks():
        figure = new_figure(4.2 * len(panels), 3.4)
        for axes, (title, points, by) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            groups = list(dict.fromkeys(getattr(point, by) for point in points))
            for number, group in enumerate(groups):
                chosen = [point for point in points if getattr(point, by) == group]
                axes.plot(
                    [point.params_M for point in chosen],
                    [point.top1 for point in chosen],
                    "o",
                    color=COLOURS[number % len(COLOURS)],
                    label=group,
                )
                for point in chosen:
                    axes.annotate(
                        point.label, (point.params_M, point.top1), (3, 3), textcoords="offset points", fontsize=6
                    )
            axes.set(xscale="log", xlabel="parameters (M)", ylabel="top-1 (%)", title=title)
            axes.margins(0.15)
            axes.legend(fontsize=7)
    return figure
