"""Learned edge functions and the distributions of the numbers that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from karat.analyze.functions import Curves, Distribution
from karat.analyze.symbolic import Formula
from karat.plots import COLOURS, INK, drawing, few_ticks, finish


def draw_functions(
    heads: Mapping[str, Curves],
    formulas: Mapping[str, Sequence[Formula]] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    *,
    scale: float = 1.0,
) -> Figure:
    """One panel a head: some of its edge functions φ_pq; the first ones' nearest formulas dotted, where given.

    `scores`, by head as well, are those that the functions act on: their histogram stands behind.
    """
    with drawing(3.1 * scale * len(heads), 2.7 * scale, columns=len(heads), sharey=True) as (figure, axes):
        for panel, (title, found) in zip(axes, heads.items(), strict=True):
            x = found.x.numpy()
            near = (formulas or {}).get(title, ())
            for edge, values in enumerate(found.values):
                named = edge < len(near)
                colour = COLOURS[edge % len(COLOURS)] if named else "#999999"
                label = None
                if named:
                    p, q = int(found.outputs[edge]), int(found.inputs[edge])
                    label = rf"$\varphi_{{{p},{q}}}$ ≈ {near[edge].text} ({100 * near[edge].error:.0f} %)"
                    panel.plot(x, near[edge].values, color=INK, linewidth=0.8, linestyle=":", zorder=4)
                panel.plot(x, values.numpy(), color=colour, linewidth=1.3 if named else 0.6, label=label, zorder=3)
            finish(panel, title, "score", "φ(score)")
            if scores is not None:
                behind = panel.twinx()
                seen = scores[title].flatten().numpy()
                behind.hist(seen, bins=40, range=(x[0], x[-1]), color=COLOURS[4], alpha=0.25)
                behind.set_axis_off()
            if near:
                panel.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


def draw_coefficients(blocks: Mapping[str, Sequence[Distribution]]) -> Figure:
    """One row a block, one panel a group of numbers (coefficients, W, ...): its histogram in each head."""
    names = list(dict.fromkeys(found.name for rows in blocks.values() for found in rows))
    with drawing(3.7 * len(names), 1.9 * len(blocks) + 0.3, rows=len(blocks), columns=len(names)) as (figure, axes):
        for row, (block, rows) in zip(axes, blocks.items(), strict=True):
            for panel, name in zip(row, names, strict=True):
                for found in (found for found in rows if found.name == name):
                    share = found.counts.numpy() / max(float(found.counts.sum()), 1)
                    label = f"head {found.head}: {found.mean:.2g} ± {found.std:.2g}"
                    colour = COLOURS[found.head % len(COLOURS)]
                    panel.stairs(share, np.asarray(found.bin_edges), color=colour, linewidth=1, label=label)
                finish(panel, f"{block}: {name}", "value", "share")
                few_ticks(panel)
                panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    return figure
