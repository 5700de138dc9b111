"""Tables of published figures for the site, made from the paper's data when it is built.

A page says `<!-- published -->` for all tables, `<!-- measured cost -->` for the costs counted here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from karat.paper import TABLES, Entry, rows

COST = Path(__file__).parents[1] / "results" / "performance" / "cost.json"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return markdown.replace("<!-- published -->", published()).replace("<!-- measured cost -->", cost())


def measured() -> dict[tuple[str, str, str], float]:
    """(model, attention, metric) -> what `karat bench cost` counted, in the paper's units."""
    found = {}
    for row in json.loads(COST.read_text(encoding="utf-8"))["rows"]:
        key = (row["model"], row["attention"])
        found[*key, "params_M"] = row["total_parity"] / 1e6
        found[*key, "activation_params_M"] = row["added_parity"] / 1e6
        found[*key, "GFLOPs"] = row["multiply_adds"] / 1e9
    return found


def plain_variant(entry: Entry) -> str:
    """The attention without what `karat bench cost` counts in any case, as cost.json writes it."""
    return entry.variant.replace(",rank=12", "")


def published() -> str:
    """Every table, folded, with the command of each row and what was measured."""
    known, parts = measured(), []
    for number, title in TABLES.items():
        parts += [f'??? note "Table {number}: {title}"', ""]
        lines = [
            "| row | model | variant | data | metric | published | measured | command |",
            "|--:|---|---|---|---|--:|--:|---|",
        ]
        for entry in rows(number):
            able, reason = entry.runnable
            found = None if entry.dataset else known.get((entry.setup.model, plain_variant(entry), entry.metric))
            cells = [
                str(entry.row),
                entry.model,
                f"`{entry.variant}`",
                entry.dataset,
                entry.metric,
                f"{entry.value:g}",
                "" if found is None else f"{found:.3f}" if entry.metric == "GFLOPs" else f"{found:.2f}",
                f"`karat paper table{number} --run {entry.row}`" if able else f"not run: {reason}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts += [f"    {line}" for line in lines] + [""]
    return "\n".join(parts)


def cost() -> str:
    """The nine models of Tables 1 and 13: counted here beside published."""
    lines = [
        "| model | attention | parameters, M | published | multiply-adds, G | published |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in json.loads(COST.read_text(encoding="utf-8"))["rows"]:
        theirs = row["published"]
        lines.append(
            f"| {row['model']} | `{row['attention']}` | {row['total_parity'] / 1e6:.2f} | {theirs['params_M']:.2f} "
            f"| {row['multiply_adds'] / 1e9:.3f} | {theirs['GFLOPs']:.3f} |"
        )
    return "\n".join(lines)
