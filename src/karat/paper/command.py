"""`karat paper [TABLE [ROW]]`: options, parsed by tyro."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from karat.errors import parse
from karat.paper.entries import rows, table_number
from karat.paper.measured import compare
from karat.paper.run import run_row, scaled_command
from karat.paper.show import commands, measured_beside, notes, one_row, one_table, overview
from karat.runs.settings import Device, Precision
from karat.values import Count, Processes, Share


@dataclass(frozen=True)
class Paper:
    """The published figures: list the tables, print one, explain one row, run it, set results beside it."""

    table: tyro.conf.Positional[str | None] = None
    """table1, table2, ...; none lists the tables, or with --results searches all of them."""
    row: tyro.conf.Positional[Count | None] = None
    """A row of the table, counted from 1: its settings and its command."""
    run: Count | None = None
    """Run that row of the table, as `karat train` would."""
    scale: Share | None = None
    """With --run: this fraction of the epochs and of the data; none: all of them."""
    results: tuple[Path, ...] = ()
    """Folders of runs whose results are put beside the published figures."""
    data: str | None = None
    """With --run: the same images elsewhere, e.g. a folder of parquet files."""
    data_dir: str | None = None
    """With --run: where torch/NAME lies or is downloaded to; none: $KARAT_DATA or ~/.cache/karat."""
    init: str | None = None
    """With --run, for fine-tuned rows: start from this RUN, FILE or hub:NAME instead of the row's own ImageNet run."""
    teacher: str | None = None
    """With --run, for Table 4: learn from this RUN instead of the row's own teacher."""
    output: str | None = None
    """With --run: the run's folder; none: the row's own, below runs/paper."""
    batch_size: Count | None = None
    """With --run: images per batch; none: the row's own."""
    workers: Processes | None = None
    """With --run: processes that load data."""
    amp_dtype: Precision | None = None
    """With --run: float32, bfloat16 or float16."""
    device: Device | None = None
    """With --run: auto or cpu."""


OF_A_RUN = ("scale", "data", "data_dir", "init", "teacher", "output", "batch_size", "workers", "amp_dtype", "device")


def _check(parsed: Paper, given: dict[str, str]) -> None:
    """Raise ValueError for options that would do nothing."""
    if parsed.run is None and given:
        name, value = next(iter(given.items()))
        raise ValueError(f"{name} {value} belongs to --run ROW, the row of a table to run")
    if parsed.run is not None and parsed.row is not None:
        raise ValueError(f"row {parsed.row} is named beside --run {parsed.run}: give one of them")
    if parsed.run is not None and parsed.results:
        raise ValueError("--results shows runs that are there already: leave it or --run out")
    if parsed.row is not None and parsed.results:
        raise ValueError(f"--results compares whole tables: leave row {parsed.row} out")


def paper(arguments: Sequence[str]) -> None:
    """karat paper."""
    parsed = parse(lambda: tyro.cli(Paper, args=arguments, prog="karat paper"), "karat paper")
    given = {f"--{n.replace('_', '-')}": str(v) for n in OF_A_RUN if (v := getattr(parsed, n)) is not None}
    _check(parsed, given)
    console = Console(markup=False)
    if parsed.run is not None:
        if parsed.table is None:
            raise ValueError(f"--run {parsed.run}: of which table? e.g. karat paper table1 --run {parsed.run}")
        (entry,) = rows(parsed.table, parsed.run)
        scale = 1.0 if parsed.scale is None else parsed.scale
        extra = {name: value for name, value in given.items() if name != "--scale"}
        if entry.setup.kind != "cost":
            print(scaled_command(entry, scale, extra))
        elif given and entry.runnable[0]:
            raise ValueError(f"row {parsed.run} is counted, not trained: leave {next(iter(given))} out")
        measured_beside(entry, run_row(entry, scale, extra), console)
    elif parsed.results:
        found = compare(rows(parsed.table), parsed.results)
        if not found:
            raise ValueError("none of these runs has the model, attention and data of a published row")
        for number in dict.fromkeys(entry.table for entry, _ in found):
            console.print(one_table(number, [pair for pair in found if pair[0].table == number]))
            print("\n".join(notes(number)))
    elif parsed.row is not None:
        (entry,) = rows(parsed.table, parsed.row)
        console.print(one_row(entry))
        print(entry.command or f"not run: {entry.runnable[1]}")
    elif parsed.table is not None:
        number = table_number(parsed.table)
        console.print(one_table(number))
        print("\n".join([*notes(number), "", *commands(number)]))
    else:
        console.print(overview())
