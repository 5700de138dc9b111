"""The first table and the figure of docs/science.md: gains over softmax, with the interval that their runs allow.

A gain is a mean over the seeds that both rows have. A run is taken to scatter about its row's mean as all rows of its
size do: s, pooled over all rows with several runs, with as many degrees of freedom. A gain over n seeds has the 95 %
interval ± t s √(2/n).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

from matplotlib.figure import Figure
from scipy import stats

from karat.plots import COLOURS, INK, finish, looks, new_figure
from karat.study.statistics import Mean

RESULTS = Path(__file__).parent / "results" / "science"
SOFTMAX, STATIC, STATIC_36 = "softmax", "beside softmax: static, rank 12", "beside softmax: static, rank 36"
G1B, G3B = "beside softmax: G1B, rank 24", "beside softmax: G3B"
TODAY = "instead of softmax: G3B, version 0.2"
STRONG = "sine-cosine positions: "
Runs = Mapping[str, Mapping[int, float]]  # of each row the last top-1, by seed
Mark = tuple[float, float, float]  # a gain, where on the axis of places, and half its interval

# The first table: what it calls a row, the row, and what it is compared with.
ROWS = {
    "softmax": (SOFTMAX, None),
    "operator instead of softmax (G3B)": ("instead of softmax: G3B", SOFTMAX),
    "**the same with the rates and the start of version 0.2**": (TODAY, SOFTMAX),
    "a function of the scores alone, beside softmax": ("beside softmax: pointwise, G6", SOFTMAX),
    "operator in one head of three (G3B)": ("one head of three: G3B", SOFTMAX),
    "static mixing beside softmax, rank 12: `recommended`": (STATIC, SOFTMAX),
    "static mixing beside softmax, rank 36": (STATIC_36, SOFTMAX),
    "operator beside softmax (G1B, rank 24), as many parameters": (G1B, SOFTMAX),
    "operator and static mixing beside softmax": (f"{G1B}, and the query's place", SOFTMAX),
    "softmax, strong position embeddings": (f"{STRONG}softmax", SOFTMAX),
    "**operator beside softmax over static mixing, rank 36**": (G1B, STATIC_36),
}
# The figure: places on its axis, each with the dim and how rows are called there.
SETTINGS = {
    "dim 96, torch's start, faint": (96, ""),
    "dim 96, timm's start, faint": (96, "timm's start: "),
    "dim 96, Xavier's start, faint": (96, "Xavier's start: "),
    "dim 96, torch's start, strong": (96, STRONG),
    "dim 192, torch's start, faint": (192, ""),
    "dim 192, torch's start, strong": (192, STRONG),
}
DRAWN = {
    "operator instead of softmax (G3B)": ("instead of softmax: G3B", COLOURS[7], "s"),
    "the same, version 0.2": (TODAY, COLOURS[2], "o"),
    "operator beside softmax (G3B)": (G3B, COLOURS[0], "o"),
    "operator beside softmax (G1B, rank 24)": (G1B, COLOURS[0], "D"),
    "static mixing beside softmax (rank 12)": (STATIC, COLOURS[1], "^"),
}


@dataclass(frozen=True)
class Gain:
    """A difference of means, and half its 95 % interval."""

    gain: float
    half: float
    runs: int

    def __str__(self) -> str:
        low, high = (f"{self.gain + side * self.half:+.1f}" for side in (-1, 1))
        return f"{self.gain:+.1f} ({low} to {high})".replace("-", "−")


def runs_of(dim: int) -> Runs:
    """All runs of a size."""
    found: dict[str, dict[int, float]] = {}
    for name in {96: ("study.json", "study-float32.json", "study-rates.json")}.get(dim, (f"study-{dim}.json",)):
        for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]:
            last = (curve[-1] for curve in row["curves"])
            found.setdefault(row["name"], {}).update(zip(row["seeds"], last, strict=True))
    return {name: runs for name, runs in found.items() if runs}


def scatter(rows: Runs) -> tuple[float, int]:
    """Of a run about its row's mean, over all rows, and its degrees of freedom."""
    several = [Mean.of(list(runs.values())) for runs in rows.values() if len(runs) > 1]
    freedom = sum(row.count - 1 for row in several)
    return math.sqrt(sum((row.count - 1) * (row.deviation or 0.0) ** 2 for row in several) / freedom), freedom


def gain(rows: Runs, name: str, base: str) -> Gain:
    """One row over another."""
    seeds = rows[name].keys() & rows[base].keys()
    deviation, freedom = scatter(rows)
    half = float(stats.t.ppf(0.975, freedom)) * deviation * math.sqrt(2 / len(seeds))
    return Gain(fmean(rows[name][seed] - rows[base][seed] for seed in seeds), half, len(seeds))


def smallest(rows: Runs, runs: int) -> float:
    """The difference of two rows of so many runs that is told from none in four cases of five, at 5 %."""
    normal = NormalDist()
    return (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * scatter(rows)[0] * math.sqrt(2 / runs)


def table() -> list[tuple[str, ...]]:
    """Of each row its name, top-1, gain and number of runs."""
    rows, lines = runs_of(96), []
    for label, (name, base) in ROWS.items():
        over = None if base is None else gain(rows, name, base)
        top1 = "" if base not in (None, SOFTMAX) else f"{fmean(rows[name].values()):.2f}"
        lines.append((label, top1, "" if over is None else str(over), str(over.runs if over else len(rows[name]))))
    return lines


def figure() -> Figure:
    """Gains over softmax with the same start and positions."""
    drawn: dict[tuple[str, str, str], list[Mark]] = {}
    for index, (label, (name, colour, marker)) in enumerate(DRAWN.items()):
        marks = drawn[label, colour, marker] = []
        for place, (dim, start) in enumerate(SETTINGS.values()):
            rows = runs_of(dim)
            row = start + (name.replace(":", ",") if start else name)
            if row in rows:
                found = gain(rows, row, f"{start}softmax")
                marks.append((found.gain, place + 0.14 * (index - 2), found.half))
    return draw_gains(list(SETTINGS), drawn)


def draw_gains(places: Sequence[str], drawn: Mapping[tuple[str, str, str], Sequence[Mark]]) -> Figure:
    """Points over softmax, a place a line: of each label, colour and marker its gains."""
    with looks():
        figure = new_figure(7.0, 3.3)
        axes = figure.subplots()
        for (label, colour, marker), marks in drawn.items():
            gains, heights, halves = zip(*marks, strict=True)
            style = {"linestyle": "", "color": colour, "marker": marker, "markersize": 4.5, "capsize": 2.5}
            axes.errorbar(gains, heights, xerr=halves, label=label, **style)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(places)), places)
        axes.invert_yaxis()
        finish(axes, "", "points over softmax of the same start and positions, 95 % intervals")
        figure.legend(loc="outside lower center", ncols=2, fontsize=7.5)
    return figure
