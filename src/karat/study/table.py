"""A study's table: on the console and as Markdown, with the columns that it has values for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill

from rich.table import Table

from karat.study.measures import HEADINGS
from karat.study.rows import VariantRow
from karat.study.statistics import Difference, Mean

NOTHING = "–"
NAME_WIDTH = 18  # the least that names get in a terminal
Cell = Callable[[VariantRow], str | None]


@dataclass(frozen=True)
class Column:
    """A heading, and what a row has there; None: nothing."""

    heading: str
    cell: Cell


def columns(rows: Sequence[VariantRow], baseline: str) -> list[Column]:
    """The columns that at least one row has something for."""
    found = [
        Column("variant", lambda row: row.name),
        Column("epochs", lambda row: str(row.epochs)),
        Column("runs", _runs),
        Column("top-1 %", lambda row: _mean(row.top1, ".2f")),
        Column(f"− {baseline}", lambda row: _gap(row.difference)),
        # of a row that is to train as long as another: how many times as long it does
        Column(
            "training time",
            lambda row: None if row.time_ratio is None else f"{row.time_ratio:.2f} × {row.equal_time_to}",
        ),
        Column(
            "at equal time",
            lambda row: "; ".join(f"{_gap(one.difference)} to {one.against}" for one in row.at_equal_time) or None,
        ),
        Column(f"in {baseline}'s time", lambda row: _number(row.in_baseline_time, ".2f")),
        Column("parameters (k)", lambda row: _number(_per(row.parameters, 1e3), ",.0f")),
        Column("multiply-adds (M)", lambda row: _number(_per(row.multiply_adds, 1e6), ",.1f")),
        *[
            Column(f"step, {kind} (ms)", partial(_step, kind))
            for kind in dict.fromkeys(kind for row in rows for kind in row.step)
        ],
        *[Column(heading, partial(_measure, name)) for name, heading in HEADINGS.items()],
    ]
    return [column for column in found if any(column.cell(row) is not None for row in rows)]


def console_table(rows: Sequence[VariantRow], baseline: str, title: str, width: int) -> Table:
    """For a terminal of this width: names may be folded, numbers not; columns that don't fit are left to the page."""
    name, *others = columns(rows, baseline)
    room = width - NAME_WIDTH - 4  # a column's frame and padding take 3, the table's 1 more
    chosen = {}  # with the width that a column needs
    for column in others:
        cells = [column.cell(row) or NOTHING for row in rows]
        needed = max(map(len, [*column.heading.split(), *cells]))
        if needed + 3 <= room:
            chosen[column] = needed
            room -= needed + 3
    left_out = len(others) - len(chosen)
    caption = f"{left_out} more columns in the Markdown page" if left_out else None
    drawn = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    drawn.add_column(name.heading, overflow="fold")
    for column, needed in chosen.items():
        drawn.add_column(fill(column.heading, needed), justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(*[column.cell(row) or NOTHING for column in (name, *chosen)])
    return drawn


def markdown(rows: Sequence[VariantRow], baseline: str) -> str:
    """A Markdown table, one line a row, ready to be put into a page."""
    chosen = columns(rows, baseline)
    lines = [[column.heading for column in chosen]]
    return grid([*lines, *[[column.cell(row) or NOTHING for column in chosen] for row in rows]])


def markdown_curves(rows: Sequence[VariantRow], most: int = 12) -> str:
    """Mean top-1 after each epoch, or after `most` evenly spaced ones and each row's last where there are more."""
    longest = max(len(row.curve) for row in rows)
    count = min(most, longest)
    spaced = {round((place + 1) * longest / count) for place in range(count)}
    epochs = sorted(spaced | {len(row.curve) for row in rows if row.curve})
    lines = [["top-1 % after epoch", *map(str, epochs)]]
    for row in rows:
        cells = [f"{row.curve[epoch - 1]:.2f}" if epoch <= len(row.curve) else NOTHING for epoch in epochs]
        lines.append([row.name, *cells])
    return grid(lines)


def grid(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Lines of cells as Markdown, the first one a heading; all columns but the first `texts` to the right."""
    rule = [*["---"] * texts, *["---:"] * (len(lines[0]) - texts)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in (lines[0], rule, *lines[1:])
    )


def _runs(row: VariantRow) -> str:
    """How many runs there are, and of how many where some are still missing."""
    done = len(row.seeds)
    return str(done) if done == row.planned else f"{done} of {row.planned}"


def _mean(value: Mean | None, form: str) -> str | None:
    if value is None:
        return None
    deviation = "" if value.deviation is None else f" ± {value.deviation:{form}}"
    return f"{value.mean:{form}}{deviation}"


def _gap(value: Difference | None) -> str | None:
    """+1.30 ± 0.20 (4.1 s): the difference, its standard error, and itself in deviations of single runs."""
    if value is None:
        return None
    error = "" if value.standard_error is None else f" ± {value.standard_error:.2f}"
    deviations = "" if value.deviations is None else f" ({value.deviations:+.1f} s)"
    return f"{value.difference:+.2f}{error}{deviations}"


def _step(kind: str, row: VariantRow) -> str | None:
    """Milliseconds of a training step in the precision `kind`."""
    return _number(_per(row.step.get(kind), 1e-3), ".1f")


def _measure(name: str, row: VariantRow) -> str | None:
    return _mean(row.measures.get(name), ".3g")


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


def _per(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
