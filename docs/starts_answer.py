"""The tables and the figure of the study of starts, from what `karat compare --study docs/studies/starts.toml` wrote.

Effects, their intervals and the smallest differences that could have been seen are the study's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from science_answer import Mark, draw_gains
from scipy import stats

from karat.plots import COLOURS
from karat.study.effects import Effect, markdown

RESULTS = Path(__file__).parent / "results" / "science"
MARKERS = "o^sD"
# The comparisons that the study's file gives eight seeds: the operator against static mixing, and the best operator
# against the best softmax, by the images that were held out.
DECIDING = (
    ("operator beside it, usual, faint", "static beside it, usual, faint"),
    ("operator beside it, usual, strong", "static beside it, usual, strong"),
    ("operator and static, mimetic, strong", "softmax, mimetic, strong"),
)

# Of what has eight seeds, each with its own best start; compared after all had been read.
AFTERWARDS = (
    ("operator beside it, usual, faint", "softmax, mimetic, strong"),
    ("static beside it, usual, faint", "softmax, mimetic, strong"),
)


def read(name: str = "starts") -> dict[str, Any]:
    """What a study or an analysis wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def means() -> tuple[list[str], list[list[str]]]:
    """Of each attention the mean top-1 in each cell, and how many runs that is; – where there is none."""
    lines: dict[str, dict[str, str]] = {}
    for row in read()["rows"]:
        levels, top1 = row["levels"], row["top1"]
        cell = "–" if top1 is None else f"{top1['mean']:.1f} ({top1['count']})"
        lines.setdefault(levels["attention"], {})[f"{levels['start']}, {levels['positions']}"] = cell
    heads = list(next(iter(lines.values())))
    return heads, [[name, *cells.values()] for name, cells in lines.items()]


def effects() -> str:
    """What each level of a factor adds over all cells, as the study's own page has it."""
    return markdown([Effect(**effect) for effect in read()["effects"] if not effect["within"]]).strip()


def paired(ours: str, theirs: str) -> tuple[float, float, float, int]:
    """The mean difference in top-1 over the seeds that two cells share, its interval of 95 %, and how many they are.

    The interval is Student's of the differences: cells needn't scatter alike.
    """
    last = {row["name"]: dict(zip(row["seeds"], (c[-1] for c in row["curves"]), strict=True)) for row in read()["rows"]}
    gaps = [last[ours][seed] - last[theirs][seed] for seed in sorted(last[ours].keys() & last[theirs].keys())]
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), fmean(gaps) - half, fmean(gaps) + half, len(gaps)


def deciding() -> list[tuple[str, str, str, str, int]]:
    """The pairs that decide: what minus what, where, points, their interval, seeds."""
    lines = []
    for ours, theirs in DECIDING:
        (level, place), against = ours.split(", ", 1), theirs.split(", ")[0]
        gap, low, high, seeds = paired(ours, theirs)
        lines.append((f"{level} − {against}", place, f"{gap:+.2f}", f"{low:+.2f} to {high:+.2f}", seeds))
    for ours, theirs in AFTERWARDS:
        gap, low, high, seeds = paired(ours, theirs)
        pair = f"{ours.split(', ')[0]} − {theirs.split(', ')[0]}"
        place = f"{ours.split(', ', 1)[1]} − {theirs.split(', ', 1)[1]}"
        lines.append((pair, place, f"{gap:+.2f}", f"{low:+.2f} to {high:+.2f}", seeds))
    return lines


def figure() -> Figure:
    """Points over softmax with the same start and positions, of each attention."""
    places, drawn = means()[0], dict[str, list[Mark]]()
    for effect in read()["effects"]:
        if len(effect["within"]) == 2:
            marks = drawn.setdefault(effect["level"], [])
            height = places.index(", ".join(effect["within"].values())) + 0.14 * (
                list(drawn).index(effect["level"]) - 1.5
            )
            marks.append((effect["difference"], height, effect["high"] - effect["difference"]))
    styles = zip(drawn, COLOURS, MARKERS, strict=False)
    return draw_gains(
        [f"{start} start, {positions} positions" for start, positions in (place.split(", ") for place in places)],
        {style: drawn[style[0]] for style in styles},
    )
