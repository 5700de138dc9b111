"""A study's figures: learning curves, accuracy against cost, differences to the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from karat.plots import COLOURS, drawing, finish, line_style, whole_epochs
from karat.study.rows import VariantRow

MARKERS = "osD^vP*X"


def draw_figures(rows: Sequence[VariantRow], baseline: str) -> dict[str, Figure]:
    """All figures by name; those that have nothing to show are left out."""
    done = [row for row in rows if row.top1 is not None]
    found = {"curves": draw_curves(done), "accuracy": draw_accuracy(done)}
    if any(row.difference is not None for row in done):
        found["differences"] = draw_differences(done, baseline)
    return found


def draw_curves(rows: Sequence[VariantRow]) -> Figure:
    """Top-1 after each epoch: the mean over a row's runs, and least to greatest of them shaded."""
    with drawing(6.6, 3.4) as (figure, panel):
        for index, row in enumerate(rows):
            epochs = range(1, len(row.curve) + 1)
            marker = "o" if len(row.curve) < 3 else None
            panel.plot(epochs, row.curve, label=row.name, marker=marker, markersize=3, **line_style(index))
            low, high = ([pick(values) for values in zip(*row.curves, strict=True)] for pick in (min, max))
            panel.fill_between(epochs, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.18, linewidth=0)
        finish(panel, "", "epoch", "top-1 (%)")
        whole_epochs(panel)
        figure.legend(loc="outside right upper", fontsize=7)
    return figure


def draw_accuracy(rows: Sequence[VariantRow]) -> Figure:
    """Top-1, mean ± deviation, against parameters and, where they were measured, against the time of a step."""
    costs = {"parameters (k)": [None if row.parameters is None else row.parameters / 1e3 for row in rows]}
    if any(row.own_step is not None for row in rows):
        costs["training step (ms)"] = [None if row.own_step is None else 1e3 * row.own_step for row in rows]
    with drawing(3.1 * len(costs) + 2.0, 3.2, columns=len(costs), sharey=True) as (figure, axes):
        for panel, (title, values) in zip(axes, costs.items(), strict=True):
            for index, (row, value) in enumerate(zip(rows, values, strict=True)):
                if value is None or row.top1 is None:
                    continue
                panel.errorbar(
                    value,
                    row.top1.mean,
                    yerr=row.top1.deviation or 0.0,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                    markersize=4.5,
                    capsize=2,
                    linestyle="none",
                    label=row.name if panel is axes[0] else None,
                )
            finish(panel, "", title, "top-1 (%)" if panel is axes[0] else "")
        figure.legend(loc="outside right upper", fontsize=7)
    return figure


def draw_differences(rows: Sequence[VariantRow], baseline: str) -> Figure:
    """Each row's top-1 minus the baseline's: thick, ± its standard error; thin, ± the deviation of single runs; the
    shade is ± the baseline's deviation."""
    others = [(row.name, row.top1, row.difference) for row in rows if row.top1 and row.difference]
    deviation = next((row.top1.deviation for row in rows if row.name == baseline and row.top1 is not None), None)
    with drawing(6.0, 0.3 * len(others) + 1.0) as (figure, panel):
        if deviation is not None:
            panel.axvspan(-deviation, deviation, color=COLOURS[-1], alpha=0.18, linewidth=0)
        panel.axvline(0.0, color=COLOURS[-1], linewidth=0.8)
        for place, (_, top1, gap) in enumerate(others):
            for reach, width, cap in ((top1.deviation, 0.8, 2.0), (gap.standard_error, 2.4, 0.0)):
                panel.errorbar(
                    gap.difference,
                    place,
                    xerr=reach or 0.0,
                    elinewidth=width,
                    capsize=cap,
                    color=COLOURS[0],
                    fmt="none",
                )
            panel.plot(gap.difference, place, "o", color=COLOURS[0], markersize=4.5)
        panel.set_yticks(range(len(others)), [name for name, _, _ in others])
        panel.set_ylim(len(others) - 0.5, -0.5)
        finish(panel, "", f"top-1 minus {baseline}'s (points)")
    return figure
