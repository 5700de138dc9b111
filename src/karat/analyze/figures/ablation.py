"""Accuracy of trained models with parts of their learned attention taken away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from karat.analyze.ablation import AblationOutcome
from karat.plots import COLOURS, drawing, finish


def draw_ablation(found: Mapping[str, Mapping[str, AblationOutcome]]) -> Figure:
    """Top-1 by what is kept of the learned part, a colour for each model; `found` by label, then by what is kept."""
    kinds = list(next(iter(found.values())))
    thick = 0.8 / len(found)
    with drawing(6.5, 0.5 + len(kinds) * max(0.3, 0.2 * len(found))) as (figure, axes):
        for index, (label, outcomes) in enumerate(found.items()):
            places = np.arange(len(kinds)) + (index - (len(found) - 1) / 2) * thick
            values = [outcomes[kind].top1 for kind in kinds]
            bars = axes.barh(places, values, 0.9 * thick, color=COLOURS[index % len(COLOURS)], label=label)
            axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        finish(axes, "", "top-1 %", "kept of the learned part")
        if len(found) > 1:
            figure.legend(loc="outside upper center", ncols=2)
    return figure
