"""README's "What to expect": its rows of trained models, recomputed from the results in docs/results."""

from __future__ import annotations

import json
from statistics import fmean, stdev
from typing import Any

import pytest

from support.paths import ROOT

RESULTS = ROOT / "docs" / "results"
OPERATOR = "operator G3, rank 12"


def runs_of(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def of_the_wider(*names: str) -> list[list[float]]:
    """The last top-1 of each seed of these attentions at dim 96."""
    rows = {row["name"]: row for row in runs_of("science/starts-width.json")["rows"]}
    return [[curve[-1] for curve in rows[name]["curves"]] for name in names]


def after_twelve_epochs(*names: str) -> list[list[float]]:
    """The last top-1 of each seed of these attentions, trained longer."""
    rows = {row["name"]: row for row in runs_of("science/starts-horizon.json")["rows"]}
    return [[curve[-1] for curve in rows[f"{name}, 12 epochs"]["curves"]] for name in names]


def of_the_starts(start: str, *names: str) -> list[list[float]]:
    """The last top-1 of each seed of these attentions in one cell of the study of starts."""
    rows = {row["name"]: row for row in runs_of("science/starts.json")["rows"]}
    return [[curve[-1] for curve in rows[f"{name}, {start}"]["curves"]] for name in names]


def of_the_tasks(*names: str) -> list[list[float]]:
    """What each seed explains of the band at the first size, in percent, without the one that chose the rate."""
    found = runs_of("science/score_tasks.json")
    seeds, size = found["configuration"]["seeds"], [16, 16]
    band = [run for run in found["runs"] if (run["task"], run["size"]) == ("band", size) and run["seed"] in seeds]
    return [[100 * run["explained"] for run in band if run["row"] == name] for name in names]


def of_the_cells(*names: str) -> list[list[float]]:
    """Box AP50 of each seed at the lower of the two rates."""
    runs = [run for run in runs_of("stability.json")["runs"] if run["task"] == "bccd-long" and not run["before"]]
    rate = min(run["peak"] for run in runs)
    return [[run["quality"] for run in runs if (run["attention"], run["peak"]) == (name, rate)] for name in names]


ROWS = {
    "top-1 %, small ViT, CIFAR-10, four epochs, three seeds": (
        of_the_wider("softmax", "operator in place", "static beside it"),
        ("", ", g1b", ", static"),
    ),
    "top-1 %, smaller ViT, three epochs, usual start": (
        of_the_starts("usual, faint", "softmax", "operator in place", "static beside it"),
        ("", ", g1b", ", static"),
    ),
    "the same, mimetic start and strong positions": (
        of_the_starts("mimetic, strong", "softmax", "operator in place", "static beside it"),
        ("", ", g1b", ", static"),
    ),
    "the smaller ViT, twelve epochs, usual start, two seeds": (
        after_twelve_epochs("softmax", "operator in place", "static beside it"),
        ("", ", g1b", ", static"),
    ),
    "explained of an answer that is a band of scores, %, five seeds": (
        of_the_tasks("softmax", OPERATOR, f"{OPERATOR}, beside softmax"),
        ("", ", g3b", ", g3b"),
    ),
    "box AP50, blood cells, six epochs, three seeds": (
        of_the_cells("softmax", "g1b", "g1b beside softmax"),
        ("", ", g1b", ", g1b"),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_what_the_results_hold(row: str) -> None:
    """Means ± deviations of single runs; a deviation that rounds to zero, or of one run, is left out."""
    runs, names = ROWS[row]
    digits = 0 if "band" in row else 1
    cells = []
    for found, name in zip(runs, names, strict=True):
        deviation = f"{stdev(found):.{digits}f}" if len(found) > 1 else "0"
        error = f" ± {deviation}" if float(deviation) else ""
        cells.append(f"{fmean(found):.{digits}f}{error}{name}" if found else "")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row} |")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [row, *cells]
    for count, word in ((1, "one run"), (2, "two seeds"), (3, "three seeds"), (5, "five seeds")):
        assert word not in row or {len(found) for found in runs if found} == {count}
