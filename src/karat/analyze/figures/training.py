"""Training curves, weights along training, cost beside softmax, sweeps over one setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from karat.analyze.sweep import Sweep
from karat.analyze.weights import Histograms
from karat.plots import COLOURS, draw_epochs, drawing, few_ticks, finish, line_style, whole_epochs

PANELS = {"train_loss": "training loss", "eval_loss": "evaluation loss", "top1": "top-1 (%)"}
AVERAGING = {"top1": "top-1 (%)", "averaged": "attention averaged: top-1 (%)", "lost": "points lost by averaging"}


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss, evaluation loss and top-1 per epoch, one line a run (lines of metrics.jsonl by run)."""
    return draw_epochs({name: [history] for name, history in histories.items()}, PANELS)


def draw_averaging(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Figure:
    """Top-1 with attention as it is and averaged over images, and their difference, over epochs: a line a run."""
    return draw_epochs(curves, AVERAGING)


def draw_histograms(found: Sequence[Histograms], moments: Sequence[str], epochs: Sequence[int]) -> Figure:
    """Each kind of weight in a panel, its histogram at some epochs of training, named by `moments`."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    with drawing(2.5 * columns, 2.0 * rows + 0.4, rows=rows, columns=columns) as (figure, axes):
        axes = axes.flatten()
        for panel, kind in zip(axes, found, strict=False):
            for index, (moment, epoch) in enumerate(zip(moments, epochs, strict=True)):
                counts = kind.counts[kind.epochs.index(epoch)].numpy()
                panel.stairs(
                    counts / max(counts.sum(), 1),
                    kind.bin_edges.numpy(),
                    label=f"{moment} ({epoch})",
                    **line_style(index, 1.0),
                )
            panel.set_yscale("log")
            panel.yaxis.set_minor_formatter(NullFormatter())
            finish(panel, kind.kind, "value", "share")
            few_ticks(panel)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title="epoch")
        for panel in axes[len(found) :]:
            panel.set_visible(False)
    return figure


def draw_divergence(found: Sequence[Histograms]) -> Figure:
    """How far each kind's histogram lies from the one it began with, by epoch."""
    with drawing(4.6, 2.8) as (figure, panel):
        for index, kind in enumerate(found):
            panel.plot(kind.epochs, kind.from_start.numpy(), label=kind.kind, **line_style(index))
        finish(panel, "weights against the start", "epoch", "divergence (bits)")
        whole_epochs(panel)
        panel.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_cost(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of what runs cost or measure: one panel a quantity, one bar a run; rows by run, {quantity: value}."""
    quantities = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = min(3, len(quantities))
    lines = -(-len(quantities) // columns)
    with drawing(2.9 * columns + 0.8, (0.32 * len(rows) + 0.55) * lines, rows=lines, columns=columns, sharey=True) as (
        figure,
        axes,
    ):
        for panel, name in zip(axes.flatten(), quantities, strict=False):
            known = {place: row[name] for place, row in enumerate(rows.values()) if name in row}
            colours = [COLOURS[place % len(COLOURS)] for place in known]
            bars = panel.barh(list(known), list(known.values()), color=colours, height=0.6)
            panel.bar_label(bars, fmt="{:,.4g}", fontsize=7, padding=2)
            low, high = min([*known.values(), 0.0]), max([*known.values(), 0.0])
            reach = max(high - low, 1e-12)
            panel.set_xlim(low - 0.3 * reach * (low < 0), high + 0.3 * reach)
            finish(panel, name)
            panel.grid(False)
            panel.tick_params(length=0)
            panel.set_xticks([])
        axes[0, 0].set_yticks(range(len(rows)), list(rows))
        axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
        for panel in axes.flatten()[len(quantities) :]:
            panel.set_visible(False)
    return figure


def draw_sweep(sweep: Sweep) -> Figure:
    """Top-1 over the setting that the runs differ in, mean ± deviation over seeds, one line a group."""
    numeric = all(isinstance(value, int | float) for value in sweep.values)
    places = list(sweep.values) if numeric else list(range(len(sweep.values)))
    with drawing(4.4, 3.0) as (figure, panel):
        for index, (name, line) in enumerate(sweep.lines.items()):
            known = [i for i, value in enumerate(line.mean) if value is not None]
            panel.errorbar(
                [places[i] for i in known],
                np.array([line.mean[i] for i in known], dtype=float),
                yerr=[line.deviation[i] or 0.0 for i in known],
                marker="o",
                markersize=4,
                capsize=2,
                label=name or None,
                **line_style(index) | ({} if numeric else {"linestyle": "none"}),  # nothing lies between two names
            )
        for index, (name, value) in enumerate(sweep.reference.items(), start=len(sweep.lines)):
            panel.axhline(value, label=name, **line_style(index, 1.0))
        panel.set_xticks(places, [str(value) for value in sweep.values])
        finish(panel, "", sweep.setting, "top-1 (%)")
        if any(sweep.lines) or sweep.reference:
            panel.legend()
    return figure
