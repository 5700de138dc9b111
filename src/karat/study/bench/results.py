"""What is kept of a measurement: a table on the screen, JSON, a figure."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from karat.study.bench.timing import environment


@dataclasses.dataclass(frozen=True)
class Rows:
    """A measurement: one dict a row, all with the same keys."""

    title: str
    rows: list[dict[str, Any]]

    def show(self) -> None:
        """Print the environment and the table."""
        console = Console(width=None if sys.stdout.isatty() else 140)
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
        content = {"title": self.title, "environment": environment(), "rows": self.rows}
        path.write_text(json.dumps(content, indent=1) + "\n")

    def draw(self, path: Path, x: str, y: str, label: str) -> None:
        """Curves of column y over column x, one for each value of column `label`, both axes logarithmic."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name in dict.fromkeys(row[label] for row in self.rows):
            points = [(row[x], row[y]) for row in self.rows if row[label] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=str(name))
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log", title=self.title)
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)

    def bars(self, path: Path, value: str, label: str, groups: Sequence[str]) -> None:
        """Bars of column `value`, one panel for each setting of the columns `groups`, one bar for each `label`."""
        from matplotlib.figure import Figure

        panels: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            panels.setdefault(", ".join(f"{row[group]}" for group in groups), []).append(row)
        figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, rows) in zip(grid, panels.items(), strict=True):
            bars = axes.barh([str(row[label]) for row in rows], [row[value] for row in rows])
            axes.bar_label(bars, [text(float(row[value])) for row in rows], padding=2, fontsize="small")
            axes.set(xlabel=value, title=title)
            axes.margins(x=0.2)
            axes.invert_yaxis()
        figure.suptitle(self.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def text(value: object) -> str:
    """A cell: numbers with three digits that matter."""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
