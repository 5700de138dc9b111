"""The tables and the figure of the study of starts, from what `karat compare --study docs/studies/starts.toml` wrote.

Effects, their intervals and the smallest differences that could have been seen are the study's own
(`karat.study.effects`); here they are only put into words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from karat.plots import COLOURS, INK, finish, looks, new_figure

RESULTS = Path(__file__).parent / "results" / "science" / "starts.json"
MARKERS = "o^sD"


def read() -> dict[str, Any]:
    """The study's study.json."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def places(study: dict[str, Any]) -> list[tuple[str, str]]:
    """The cells' (start, positions), in the study's order."""
    return list(dict.fromkeys((row["levels"]["start"], row["levels"]["positions"]) for row in study["rows"]))


def means() -> tuple[list[str], list[list[str]]]:
    """Of each attention the mean top-1 in each cell, and how many runs that is; – where there is none."""
    study = read()
    columns, lines = places(study), dict[str, dict[tuple[str, str], str]]()
    for row in study["rows"]:
        levels, top1 = row["levels"], row["top1"]
        cell = "–" if top1 is None else f"{top1['mean']:.1f} ({top1['count']})"
        lines.setdefault(levels["attention"], {})[levels["start"], levels["positions"]] = cell
    heads = [f"{start}, {positions}" for start, positions in columns]
    return heads, [[name, *(cells.get(column, "–") for column in columns)] for name, cells in lines.items()]


def effects() -> list[list[str]]:
    """Of each level of a factor over all cells: what it adds, with its interval, the least that is seen, and cells."""
    lines = []
    for effect in read().get("effects", ()):
        if not effect["within"]:
            interval, least = "", ""
            if effect["low"] is not None:
                interval = f" ({effect['low']:+.1f} to {effect['high']:+.1f})"
                least = f"{effect['least_seen']:.1f}"
            gap = f"{effect['difference']:+.1f}{interval}".replace("-", "−")
            lines.append([f"{effect['level']} over {effect['against']}", gap, least, str(effect["cells"])])
    return lines


def _gains(study: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str], dict[str, Any]]]:
    """Each attention's effect over softmax within each start and kind of positions."""
    for effect in study.get("effects", ()):
        if effect["factor"] == "attention" and len(effect["within"]) == 2:
            yield effect["level"], (effect["within"]["start"], effect["within"]["positions"]), effect


def figure() -> Figure:
    """Points over softmax with the same start and positions."""
    study = read()
    columns = places(study)
    found = list(_gains(study))
    with looks():
        drawn = new_figure(7.0, 3.3)
        axes = drawn.subplots()
        for index, name in enumerate(dict.fromkeys(name for name, _, _ in found)):
            own = [(columns.index(place) + 0.14 * (index - 1.5), effect) for one, place, effect in found if one == name]
            sure = [0.0 if effect["high"] is None else effect["high"] - effect["difference"] for _, effect in own]
            gains, heights = [effect["difference"] for _, effect in own], [height for height, _ in own]
            style = {
                "linestyle": "",
                "color": COLOURS[index],
                "marker": MARKERS[index],
                "markersize": 4.5,
                "capsize": 2.5,
            }
            axes.errorbar(gains, heights, xerr=sure, label=name, **style)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(columns)), [f"{start} start, {positions} positions" for start, positions in columns])
        axes.invert_yaxis()
        finish(axes, "", "points over softmax of the same start and positions, 95 % intervals")
        drawn.legend(loc="outside lower center", ncols=2, fontsize=7.5)
    return drawn
