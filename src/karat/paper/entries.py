"""The published figures as entries with the settings behind them, found by table and row."""

from __future__ import annotations

import re
from functools import cache, cached_property

from karat.paper.published import PublishedFigure, published
from karat.paper.setup import Setup, command_line, read_setup

# The tables that hold figures, and what is in them (Tables 5, 6 and 9 to 11 hold settings).
TABLES = {
    1: "ViT-Base, Small and Tiny: accuracy and parameters",
    2: "fine-tuned from ImageNet-1K",
    3: "ConViT-Tiny and Swin-Tiny",
    4: "attention transferred from a trained teacher",
    7: "base activations",
    8: "other bases",
    12: "detection and segmentation (ViTDet, COCO)",
    13: "parameters, operations and memory",
    14: "deep B-spline KAN classifiers",
    15: "grid sizes",
    16: "ranks of ViT-Base",
    17: "simplex projection",
    18: "low ranks: accuracy and cost",
    19: "orders of the operator",
    20: "hybrid heads",
}


class Entry(PublishedFigure):
    """One published figure, its settings and its command."""

    @cached_property
    def setup(self) -> Setup:
        """The settings behind the figure."""
        return read_setup(self.model, self.variant, self.dataset, self.note)

    @property
    def command(self) -> str:
        """The command that measures it; empty for a row that can't be run here (see `runnable`)."""
        if not self.runnable[0]:
            return ""
        if self.setup.kind == "cost":
            return f"karat paper table{self.table} --run {self.row}"
        return command_line(self.setup.program, self.setup.options())

    @property
    def runnable(self) -> tuple[bool, str]:
        """Whether the figure can be measured here, and why not."""
        reason = _COST_REASONS.get(self.metric, "") if self.setup.kind == "cost" else ""
        return not reason, reason


_COST_REASONS = {
    "activation_GFLOPs": "the paper counts the activation's elementwise operations by a formula it does not give",
    "gpu_memory_GB_batch32": "measured on the paper's GPU; `karat bench memory` measures this machine",
}


@cache
def _entries() -> tuple[Entry, ...]:
    return tuple(Entry(**vars(figure)) for figure in published())


def table_number(table: str | int) -> int:
    """1 for 1, "1" and "table1". Raises ValueError for a table that holds no figures."""
    found = re.fullmatch(r"(?:table)?\s*(\d+)", str(table).strip().lower())
    if found is None or int(found[1]) not in TABLES:
        raise ValueError(f"no table {table!r}; those with figures are {', '.join(f'table{n}' for n in TABLES)}")
    return int(found[1])


def rows(table: str | int | None = None, row: int | None = None) -> list[Entry]:
    """The published figures: all, those of one table ("table1" or 1), or one row of it (counted from 1).

    Raises ValueError for a table or row that isn't there.
    """
    if table is None:
        if row is not None:
            raise ValueError(f"row {row} of which table? give both")
        return list(_entries())
    number = table_number(table)
    found = [entry for entry in _entries() if entry.table == number]
    if row is None:
        return found
    if not 1 <= row <= len(found):
        raise ValueError(f"table{number} has rows 1 to {len(found)}, not {row}")
    return [found[row - 1]]
