"""The paper's figures as they are printed: published.csv, read once. Nothing of karat is imported: all may read it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class PublishedFigure:
    """One published figure: `row` counts from 1 within its table; value in percent for accuracies and AP.

    decimals: how many places the table gives figures of this metric.
    """

    table: int
    row: int
    model: str
    variant: str
    dataset: str
    metric: str
    value: float
    note: str
    decimals: int

    @property
    def printed(self) -> str:
        """The value as it is printed, last zero included: 72.90."""
        return f"{self.value:.{self.decimals}f}" if self.value else "0"


@cache
def published() -> tuple[PublishedFigure, ...]:
    """The figures of arXiv 2503.10632v3, table by table."""
    text = resources.files("karat.paper").joinpath("published.csv").read_text(encoding="utf-8")
    found: list[PublishedFigure] = []
    lines = list(csv.DictReader(text.splitlines()))
    places: dict[tuple[str, str], int] = {}
    for line in lines:
        kind = (line["table"], line["metric"])
        places[kind] = max(places.get(kind, 0), len(line["value"].partition(".")[2]))
    for line in lines:
        table = int(line["table"])
        row = 1 + sum(figure.table == table for figure in found)
        words = (line["model"], line["variant"], line["dataset"], line["metric"])
        found.append(
            PublishedFigure(
                table, row, *words, float(line["value"]), line["note"], places[line["table"], line["metric"]]
            )
        )
    return tuple(found)


def values_by_model(table: int, dataset: str = "") -> dict[tuple[str, str], dict[str, float]]:
    """{metric: value} of each (model, variant) of a table on a data set; without one, what a model has by itself.

    >>> values_by_model(13)["vit_tiny", "g3b"]["GFLOPs"]
    1.425
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for figure in published():
        if (figure.table, figure.dataset) == (table, dataset):
            found.setdefault((figure.model, figure.variant), {})[figure.metric] = figure.value
    return found
