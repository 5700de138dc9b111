"""What the learned part of attention consists of, block by block and head by head, beside softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karat.analyze.parts import AttentionParts, Shares
from karat.plots import COLOURS, drawing, finish

KINDS = (("row", "one row for all queries and images"), ("place", "the query's place"), ("scores", "the scores"))


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
    places = _places(blocks)
    bottom = np.zeros(len(places))
    for index, (name, label) in enumerate(KINDS):
        height = np.concatenate([getattr(one, name).clamp(min=0).numpy() for one in found])
        axes.bar(places, height, 0.85, bottom=bottom, color=COLOURS[index], label=label)
        bottom = bottom + height
    finish(axes, title, "", "share of power")
    axes.set_ylim(0, 1)
    _name_blocks(axes, blocks)


def _bars(axes: Axes, blocks: Sequence[AttentionParts], heights: np.ndarray, label: str) -> None:
    axes.bar(_places(blocks), heights, 0.85, color=COLOURS[-1])
    axes.axhline(0, color=COLOURS[-2], linewidth=0.6)
    finish(axes, "", "block (a bar for each head)", label)
    _name_blocks(axes, blocks)


def _places(blocks: Sequence[AttentionParts]) -> np.ndarray:
    """Where the bars stand: heads side by side, a gap between blocks."""
    heads = [len(block.heads) for block in blocks]
    starts = np.cumsum([0, *(count + 1 for count in heads[:-1])])
    return np.concatenate([start + np.arange(count) for start, count in zip(starts, heads, strict=True)])


def _name_blocks(axes: Axes, blocks: Sequence[AttentionParts]) -> None:
    places, at, ticks = _places(blocks), 0, []
    for block in blocks:
        ticks.append(float(places[at : at + len(block.heads)].mean()))
        at += len(block.heads)
    axes.set_xticks(ticks, [block.name.split(".")[-2] if "." in block.name else block.name for block in blocks])
