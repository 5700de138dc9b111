"""Singular values of attention before and after activation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from karat.analyze.spectrum import Spectrum
from karat.plots import drawing, finish, line_style

# Values below this share of the largest one are rounding: they would stretch the axis.
FLOOR = 1e-8


def draw_spectra(panels: Mapping[str, Mapping[str, Spectrum]]) -> Figure:
    """One panel each (e.g. a run): the mean singular value over its index, on a log scale, least to greatest shaded.

    The curves of a panel are named, e.g. "A" and "σ(A)"; a dot marks the scree index.
    """
    with drawing(3.3 * len(panels), 3.2, columns=len(panels), sharey=True) as (figure, axes):
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            for index, (name, found) in enumerate(curves.items()):
                place = np.arange(1, len(found.mean) + 1)
                floor = float(found.mean.max()) * FLOOR
                mean, low, high = (np.maximum(part.numpy(), floor) for part in (found.mean, found.low, found.high))
                label = f"{name}: effective rank {found.effective_rank:.1f}, break at {found.scree_index}"
                panel.plot(place, mean, label=label, **line_style(index))
                panel.fill_between(place, low, high, color=line_style(index)["color"], alpha=0.18, linewidth=0)
                at = max(found.scree_index, 1)
                panel.plot(at, mean[at - 1], "o", color=line_style(index)["color"], markersize=4)
            panel.set_yscale("log")
            finish(panel, title, "index", "singular value")
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5)
    return figure
