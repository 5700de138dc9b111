"""What is kept of a measurement: a table on the screen, JSON, a figure."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from karat.plots import COLOURS, drawing, finish, line_style, save
from karat.runs.files import write_json
from karat.study.bench.timing import environment


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measurement: one dict a row, all with the same keys."""

    title: str
    rows: list[dict[str, Any]]

    def show(self) -> None:
        """Print the environment and the table."""
        console = Console(markup=False, width=None if sys.stdout.isatty() else 140)
        console.print(", ".join(f"{key} {value}" for key, value in environment().items()), highlight=False)
        table = Table(title=self.title)
        for i, column in enumerate(self.rows[0]):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*map(text, row.values()))
        console.print(table)

    def save(self, path: Path) -> None:
        """Write {"title", "environment", "rows"} as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"title": self.title, "environment": environment(), "rows": self.rows})

    def draw(self, path: Path, x: str, y: str, label: str) -> None:
        """Curves of column y over column x, one for each value of column `label`, both axes logarithmic."""
        with drawing(6, 4) as (figure, axes):
            for index, name in enumerate(dict.fromkeys(row[label] for row in self.rows)):
                points = [(row[x], row[y]) for row in self.rows if row[label] == name]
                axes.plot(*zip(*points, strict=True), marker="o", label=str(name), **line_style(index))
            axes.set(xscale="log", yscale="log")
            finish(axes, self.title, x, y)
            axes.legend()
        save(figure, path)

    def bars(self, path: Path, value: str, label: str, groups: Sequence[str]) -> None:
        """Bars of column `value`, one panel for each setting of the columns `groups`, one bar for each `label`."""
        panels: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            panels.setdefault(", ".join(f"{row[group]}" for group in groups), []).append(row)
        with drawing(3.2 * len(panels), 3.2, columns=len(panels)) as (figure, grid):
            for axes, (title, rows) in zip(grid, panels.items(), strict=True):
                bars = axes.barh([str(row[label]) for row in rows], [row[value] for row in rows], color=COLOURS[0])
                axes.bar_label(bars, [text(float(row[value])) for row in rows], padding=2)
                axes.margins(x=0.2)
                axes.invert_yaxis()
                finish(axes, title, value)
            figure.suptitle(self.title)
        save(figure, path)


def text(value: object) -> str:
    """A cell: numbers with three digits that matter."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
