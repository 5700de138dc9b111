"""Finished runs side by side: one table of their last figures, one figure of their curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from karat import runs
from karat.detect.settings import DetectSettings
from karat.plots import draw_epochs, save
from karat.runs import files

RESULT, FIGURE = "compare.json", "curves.png"
# figure of an epoch -> title of its panel
PANELS = {
    "train_loss": "training loss",
    "box_AP50": "box AP50, evaluation images (%)",
    "mask_AP50": "mask AP50, evaluation images (%)",
    "train_box_AP50": "box AP50, training images (%)",
}
SHOWN = {
    "box_AP": "box AP",
    "box_AP50": "box AP50",
    "mask_AP": "mask AP",
    "mask_AP50": "mask AP50",
    "train_box_AP50": "train AP50",
}
COLUMNS = ("box_AP", "box_AP50", "mask_AP", "mask_AP50", "train_box_AP50", "train_mask_AP50")


def compare_runs(folders: Sequence[Path], output: Path) -> list[dict[str, Any]]:
    """Write compare.json and curves.png about the runs into `output` and return the rows, figures of the last epoch.

    Raises ValueError for a folder that is no run of detection, or has no finished epoch.
    """
    if not folders:
        raise ValueError("no runs: name at least one folder")
    rows, histories = [], {}
    for folder in folders:
        settings, facts = runs.read_config(folder, DetectSettings)
        history = runs.read_history(folder)
        if not history:
            raise ValueError(f"{folder} has no finished epoch to show")
        last = history[-1]
        row: dict[str, Any] = {
            "run": str(folder),
            "model": settings.model,
            "attention": settings.attention,
            "parameters": facts["parameters"],
            "epochs": len(history),
        }
        row |= {name: last[name] for name in COLUMNS if name in last}
        row["seconds_per_epoch"] = statistics.median(line["seconds"] for line in history)
        row["peak_memory_mib"] = max(line["peak_memory_mib"] for line in history)
        rows.append(row)
        histories[str(folder)] = [history]
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / RESULT, rows)
    save(draw_epochs(histories, PANELS), output / FIGURE)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal; compare.json has all of them."""
    drawn = Table(title="detectors after their last epoch (%)", title_justify="left")
    drawn.add_column("run", overflow="fold")
    names = [name for name in SHOWN if any(name in row for row in rows)]
    for title in ("parameters", *(SHOWN[name] for name in names), "s/epoch"):
        drawn.add_column(title, justify="right")
    for row in rows:
        figures = [f"{row[name]:.1f}" if name in row else "–" for name in names]
        drawn.add_row(row["run"], f"{row['parameters']:,}", *figures, f"{row['seconds_per_epoch']:.1f}")
    return drawn
