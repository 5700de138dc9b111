"""The tables and the figure of the study of starts, from what `karat compare --study docs/studies/starts.toml` wrote.

Effects, their intervals and the smallest differences that could have been seen are the study's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from science_answer import Mark, draw_gains

from karat.plots import COLOURS
from karat.study.effects import Effect, markdown

RESULTS = Path(__file__).parent / "results" / "science" / "starts.json"
MARKERS = "o^sD"


def read() -> dict[str, Any]:
    """The study's study.json."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
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
