"""The paper's tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from karat.paper.entries import TABLES, Entry, rows
from karat.paper.measured import Measured


def overview() -> Table:
    """All tables: how many figures, how many of them can be run here."""
    table = Table(title="published figures (arXiv 2503.10632)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("table")
    table.add_column("what")
    table.add_column("figures", justify="right")
    table.add_column("runnable here", justify="right")
    for number, title in TABLES.items():
        entries = rows(number)
        table.add_row(f"table{number}", title, str(len(entries)), str(sum(e.runnable[0] for e in entries)))
    total = rows()
    table.add_section()
    table.add_row("", "all", str(len(total)), str(sum(e.runnable[0] for e in total)))
    return table


def one_table(number: int, results: Sequence[tuple[Entry, Measured]] = ()) -> Table:
    """One table's figures, and what was measured beside them where runs are given."""
    entries = rows(number)
    table = Table(title=f"Table {number}: {TABLES[number]}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("row", "model", "variant", "data", "metric"):
        table.add_column(name, overflow="fold", justify="right" if name == "row" else "left")
    table.add_column("published", justify="right")
    if results:
        table.add_column("measured", justify="right")
        table.add_column("run", overflow="fold")
    for entry in entries:
        found = [run for e, run in results if e == entry]
        cells = [str(entry.row), entry.model, entry.variant, entry.dataset, entry.metric, entry.printed]
        if results:
            cells.append("\n".join(f"{run.figures[entry.metric]:.2f}" for run in found))
            cells.append("\n".join(run.run + (f" ({run.caveat})" if run.caveat else "") for run in found))
        table.add_row(*cells)
    return table


def notes(number: int) -> list[str]:
    """What the paper contradicts itself in, and the like, by rows."""
    return [f"rows {_ranges(found)}: {note}" for note, found in _grouped(rows(number), lambda e: e.note).items()]


def commands(number: int) -> list[str]:
    """The commands that measure a table's figures, by rows, and why some can't be measured."""
    entries = rows(number)
    by_command = _grouped(entries, lambda e: "" if e.setup.kind == "cost" else e.command)
    lines = [f"rows {_ranges(found)}: {command}" for command, found in by_command.items()]
    counted = [e.row for e in entries if e.setup.kind == "cost" and e.runnable[0]]
    if counted:
        lines.append(f"rows {_ranges(counted)}: karat paper table{number} --run ROW")
    by_reason = _grouped(entries, lambda e: e.runnable[1])
    return [*lines, *[f"rows {_ranges(found)}: not run: {reason}" for reason, found in by_reason.items()]]


def _grouped(entries: Sequence[Entry], key: Callable[[Entry], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for entry in entries:
        if text := key(entry):
            groups.setdefault(text, []).append(entry.row)
    return groups


def _ranges(numbers: Sequence[int]) -> str:
    """1-3, 5 for 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def one_row(entry: Entry) -> Table:
    """Everything that is known of one figure, but its command."""
    table = Table(box=None, show_header=False, title=f"Table {entry.table}, row {entry.row}", title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    setup = entry.setup
    facts = {
        "model": f"{entry.model} ({setup.model})",
        "variant": entry.variant,
        "data": entry.dataset and f"{entry.dataset} ({setup.data}, {setup.num_classes} classes)",
        "published": f"{entry.metric} {entry.printed}",
        "attention": setup.attention,
        "kind": setup.kind,
        "recipe": setup.recipe,
        "epochs": str(setup.epochs or ""),
        "batch size": str(setup.batch_size or ""),
        "starts from": setup.init if setup.kind in ("finetune", "detect") else "",
        "teacher": setup.teacher,
        "note": entry.note,
    }
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    return table


def measured_beside(entry: Entry, measured: dict[str, float], console: Console) -> None:
    """Print one row's measured figures beside every published one of the same settings and metric."""
    alike = [e for e in rows(entry.table) if e.setup == entry.setup and e.variant == entry.variant]
    table = Table(box=box.SIMPLE_HEAD, title=f"{entry.model} {entry.variant} {entry.dataset}", title_justify="left")
    for name in ("metric", "published", "measured"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for other in alike:
        if other.metric in measured:
            table.add_row(other.metric, other.printed, f"{measured[other.metric]:.3f}")
    console.print(table)
