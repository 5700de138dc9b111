"""The table of a study in a terminal: whole numbers at every width, and all columns where there is room."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.console import Console

from karat.study.rows import VariantRow
from karat.study.statistics import Difference, Mean
from karat.study.table import NAME_WIDTH, columns, console_table

BASE = VariantRow("softmax", "softmax", 4, (0, 1), 2, "float32", top1=Mean(37.04, 0.91, 2), parameters=2_693_578)
ROWS = [
    BASE,
    VariantRow(
        "beside softmax: static, rank 12, in every block but the first and the last",
        "static-b,residual=softmax",
        4,
        (0, 1),
        3,
        "float32",
        top1=Mean(46.56, 0.91, 2),
        difference=Difference(9.52, 0.91, 10.5),
        equal_time_to="softmax",
        time_ratio=1.2,
        parameters=2_749_774,
        step={"float32": 0.5123, "bfloat16": 0.2},
    ),
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 130, 200])
def test_numbers_stay_whole_at_every_width(width: int) -> None:
    console = Console(width=width)
    table = console_table(ROWS, "softmax", "a study", width)
    with console.capture() as capture:
        console.print(table)
    frame = [line for line in capture.get().splitlines() if line.startswith(("┏", "┡", "└", "│", "┃"))]
    assert {cell_len(line) for line in frame} == {cell_len(frame[0])}
    assert cell_len(frame[0]) <= width
    assert all(line[-1] in "┓┃┩│┘" for line in frame)  # nothing is cut off on the right
    shown = len(table.columns)
    everything = columns(ROWS, "softmax")
    said = "" if shown == len(everything) else f"{len(everything) - shown} more columns in the Markdown page"
    assert (table.caption or "") == said
    headings = [str(column.header).replace("\n", " ") for column in table.columns]
    chosen = [column for column in everything if column.heading in headings]
    assert [column.heading for column in chosen] == headings  # in their order, names first
    assert headings[0] == "variant"
    text = "\n".join(frame)
    for column in chosen[1:]:
        assert all((column.cell(row) or "–") in text for row in ROWS)
    taken = sum(3 + widest([*map(str, column.cells), *str(column.header).split()]) for column in table.columns[1:])
    for column in everything[1:]:  # none is left out that has room
        needed = 3 + widest([*(column.cell(row) or "–" for row in ROWS), *column.heading.split()])
        assert column in chosen or NAME_WIDTH + 4 + taken + needed > width


def widest(texts: list[str]) -> int:
    return max(map(len, texts))


def test_a_wide_terminal_has_all_columns() -> None:
    table = console_table(ROWS, "softmax", "a study", 400)
    assert len(table.columns) == len(columns(ROWS, "softmax")) == 9
    assert table.caption is None
