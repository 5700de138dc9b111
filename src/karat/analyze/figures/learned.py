"""What learned attention is made of: its edge functions, its parts beside softmax, accuracy with parts taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from karat.analyze.ablation import AblationOutcome
from karat.analyze.functions import Curves, Distribution
from karat.analyze.parts import AttentionParts, Shares
from karat.analyze.symbolic import Formula
from karat.plots import COLOURS, INK, drawing, few_ticks, finish

KINDS = (("row", "one row for all queries and images"), ("place", "the query's place"), ("scores", "the scores"))


def draw_functions(
    heads: Mapping[str, Curves],
    formulas: Mapping[str, Sequence[Formula]] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    *,
    argument: str = "score",
    scale: float = 1.0,
) -> Figure:
    """One panel a head: some of its edge functions φ_pq; the first ones' nearest formulas dotted, where given.

    `scores`, by head as well, are what the functions act on, called `argument`: their histogram stands behind.
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
            finish(panel, title, argument, f"φ({argument})")
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


def draw_parts(blocks: Sequence[AttentionParts]) -> Figure:
    """Shares of power as stacked bars, one bar a head: of the learned part, of softmax; below, sizes and gates."""
    with drawing(
        max(6.5, 0.22 * sum(len(block.heads) for block in blocks) + 2.5), 4.2, rows=2, columns=2, height_ratios=(3, 2)
    ) as (figure, (upper, lower)):
        _stack(upper[0], blocks, [block.learned for block in blocks], "learned part")
        _stack(upper[1], blocks, [block.softmax for block in blocks], "softmax of the same scores")
        _bars(lower[0], blocks, np.concatenate([block.size.numpy() for block in blocks]), "size against softmax")
        _bars(lower[1], blocks, np.concatenate([block.gates.numpy() for block in blocks]), "gate")
        handles, labels = upper[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _stack(axes: Axes, blocks: Sequence[AttentionParts], found: Sequence[Shares], title: str) -> None:
    places = np.concatenate(_places(blocks))
    bottom = np.zeros(len(places))
    for index, (name, label) in enumerate(KINDS):
        height = np.concatenate([getattr(one, name).clamp(min=0).numpy() for one in found])
        axes.bar(places, height, 0.85, bottom=bottom, color=COLOURS[index], label=label)
        bottom = bottom + height
    finish(axes, title, "", "share of power")
    axes.set_ylim(0, 1)
    _name_blocks(axes, blocks)


def _bars(axes: Axes, blocks: Sequence[AttentionParts], heights: np.ndarray, label: str) -> None:
    axes.bar(np.concatenate(_places(blocks)), heights, 0.85, color=COLOURS[-1])
    axes.axhline(0, color=COLOURS[-2], linewidth=0.6)
    finish(axes, "", "block (a bar for each head)", label)
    _name_blocks(axes, blocks)


def _places(blocks: Sequence[AttentionParts]) -> list[np.ndarray]:
    """Where each block's bars stand: heads side by side, a gap between blocks."""
    starts = np.cumsum([0, *(len(block.heads) + 1 for block in blocks)])
    return [start + np.arange(len(block.heads)) for start, block in zip(starts, blocks, strict=False)]


def _name_blocks(axes: Axes, blocks: Sequence[AttentionParts]) -> None:
    names = [block.name.split(".")[-2] if "." in block.name else block.name for block in blocks]
    axes.set_xticks([float(places.mean()) for places in _places(blocks)], names)


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
