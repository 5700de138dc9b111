"""The tables that the documentation makes from results: written into its pages before the site is built.

    python docs/tables.py

A page says `<!-- table: NAME -->` and `<!-- end of table -->`; what stands between the two is written, NAME being a key
of TABLES. Pages that already hold their tables aren't touched.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import longer_answer
import science_answer
import starts_answer

from karat.operator.fixed import FIXED
from karat.paper import TABLES as PUBLISHED
from karat.paper import Entry, rows

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
RUNNING = "*The study is running; the table follows with its results.*"


def read(name: str) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def markdown(columns: str, lines: Iterable[Iterable[object]]) -> str:
    """A table; `columns` are its first two lines' cells, "name | value >" with > after what is aligned to the right."""
    names = [name.strip() for name in columns.split("|")]
    marks = ["--:" if name.endswith(">") else "---" for name in names]
    heads = [name.rstrip("> ") for name in names]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [heads, marks, *lines])


def measured_costs() -> dict[tuple[str, str, str], float]:
    """(model, attention, metric) -> what `karat bench cost` counted, in the paper's units."""
    found = {}
    for row in read("performance/cost.json")["rows"]:
        key = (row["model"], row["attention"])
        found[*key, "params_M"] = row["total_parity"] / 1e6
        found[*key, "activation_params_M"] = row["added_parity"] / 1e6
        found[*key, "GFLOPs"] = row["multiply_adds"] / 1e9
    return found


def published() -> str:
    """Every published table, folded, with the command of each row and what was measured."""
    known = measured_costs()

    def measured(entry: Entry) -> str:
        variant = entry.variant.replace(",rank=12", "")  # what `karat bench cost` counts in any case
        found = None if entry.dataset else known.get((entry.setup.model, variant, entry.metric))
        return "" if found is None else f"{found:.3f}" if entry.metric == "GFLOPs" else f"{found:.2f}"

    def cells(number: int, entry: Entry) -> tuple[object, ...]:
        able, reason = entry.runnable
        command = f"`karat paper table{number} --run {entry.row}`" if able else f"not run: {reason}"
        names = (entry.row, entry.model, f"`{entry.variant}`", entry.dataset, entry.metric)
        return (*names, entry.printed, measured(entry), command)

    parts = []
    for number, title in PUBLISHED.items():
        columns = "row > | model | variant | data | metric | published > | measured > | command"
        table = markdown(columns, (cells(number, entry) for entry in rows(number)))
        parts.append(f"<details markdown>\n<summary>Table {number}: {title}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def cost() -> str:
    """The nine models of Tables 1 and 13: counted here beside published."""
    return markdown(
        "model | attention | parameters, M > | published > | multiply-adds, G > | published >",
        (
            (
                row["model"],
                f"`{row['attention']}`",
                f"{row['total_parity'] / 1e6:.2f}",
                f"{row['published']['params_M']:.2f}",
                f"{row['multiply_adds'] / 1e9:.3f}",
                f"{row['published']['GFLOPs']:.3f}",
            )
            for row in read("performance/cost.json")["rows"]
        ),
    )


def rates() -> str:
    """The relative change of an operator's output by one Adam step and by a hundred, over N: least to most."""
    found = read("rates.json")
    kinds = {
        "WPhi": "W∘Φ, R 2 to 48, G 1 to 11",
        "PhiW": "Φ∘W, the same",
        "PhiPhi": "Φ₂∘Φ₁, the same",
        "Full": "full rank, G 1 to 11",
        "basis": "the eight bases, R = 12",
        "control": "static, row, pointwise, beside softmax",
        "paper's draws": "`init=paper`, factors of one",
    }
    tokens = sorted({row["tokens"] for row in found["operators"]})

    def span(values: list[float], digits: int) -> str:
        texts = list(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))) if values else ["–"]
        return " to ".join(texts)

    def cells(kind: str, key: str, scale: float, digits: int) -> list[str]:
        chosen = [row for row in found["operators"] if row["kind"] == kind and row[key] is not None]
        return [span([scale * row[key] for row in chosen if row["tokens"] == n], digits) for n in tokens]

    linear = next(row for row in found["layers"] if row["kind"] == "linear" and row["width"] == 192)
    columns = ["in units of 10⁻³", *(f"N = {n} >" for n in tokens), *(f"100 steps, N = {n} >" for n in tokens)]
    same = [f"{1e3 * linear['one']:.0f}"] * len(tokens) + [f"{1e3 * linear['hundred']:.0f}"] * len(tokens)
    lines = [(name, *cells(kind, "one", 1e3, 0), *cells(kind, "hundred", 1e3, 0)) for kind, name in kinds.items()]
    return markdown(" | ".join(columns), [("a linear layer of width 192", *same), *lines])


def layer_rates() -> str:
    """The same of layers of KAN MLPs, over the width, and as a multiple of a linear layer's."""
    rows = read("rates.json")["layers"]
    widths = sorted({row["width"] for row in rows})
    one = {(row["kind"], row["width"]): row["one"] for row in rows}

    def cells(kind: str) -> list[str]:
        times = [one[kind, width] / one["linear", width] for width in widths]
        return [f"{1e3 * one[kind, width]:.0f} ({x:.1f}×)" for width, x in zip(widths, times, strict=True)]

    columns = ["one step, 10⁻³", *(f"width {width} >" for width in widths)]
    return markdown(" | ".join(columns), ([kind, *cells(kind)] for kind in dict.fromkeys(row["kind"] for row in rows)))


def printed(benchmark: str) -> str:
    """What a benchmark prints with --table: run here, as another process would import torch anew."""
    script, said, before = DOCS.parent / "benchmarks" / benchmark, io.StringIO(), (sys.argv, sys.path)
    sys.argv, sys.path = [str(script), "--table"], [str(script.parent), *sys.path]
    try:
        with contextlib.chdir(DOCS.parent), contextlib.redirect_stdout(said):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    return said.getvalue().strip()


def stability() -> str:
    """Quality over learning rates, by the benchmark that measures it; a line while that is running."""
    if not (RESULTS / "stability.json").exists():
        return RUNNING
    return printed("stability.py")


def score_tasks() -> str:
    """What attentions learn of tasks whose answers are functions of the scores, by the benchmark that trains them."""
    return printed("score_tasks.py")


def science() -> str:
    """Gains over softmax, with intervals."""
    columns = "small ViT, dim 96, CIFAR-10, four epochs | top-1 % > | over softmax (95 % interval) > | runs >"
    return markdown(columns, science_answer.table())


def starts() -> str:
    """Of the study of starts the mean of each cell."""
    heads, lines = starts_answer.means()
    return markdown(" | ".join(["top-1 % (runs)", *(f"{head} >" for head in heads)]), lines)


def deciding() -> str:
    """Of the study of starts the pairs that have most seeds."""
    columns = "of one seed each | start, positions | points > | 95 % > | seeds >"
    return markdown(columns, starts_answer.deciding())


def wider() -> str:
    """Of the study at dim 96 and depth 6 each attention."""
    columns = "dim 96, depth 6, four epochs | top-1 % > | over softmax (95 %) > | seen with 80 % power > | runs >"
    return markdown(columns, longer_answer.wide())


def longer() -> str:
    """Of the study of longer training each attention, over epochs."""
    times = [f"{epochs} epochs >" for epochs in longer_answer.HORIZONS]
    gains = [f"over softmax, {epochs} >" for epochs in longer_answer.HORIZONS]
    return markdown(" | ".join(["dim 64, depth 4, top-1 % (runs)", *times, *gains]), longer_answer.long())


def served() -> str:
    """Each model with attention: how it was converted, what it does then, and why not."""
    rows = {name: row for name, row in read("served.json")["rows"].items() if row["attention"] is not False}

    def cells(name: str, row: dict[str, Any]) -> tuple[object, ...]:
        works = ["yes" if row.get(key) else "no" if row.get("converted") else "" for key in ("trained", "exported")]
        reason = (row.get("reason") or row.get("export_error") or "").replace("|", "/")
        short = reason if len(reason) <= 160 else reason[:157] + "..."
        return (f"`{name}`", row.get("converted") or "no", row.get("sites", ""), *works, short)

    lines = [cells(name, row) for name, row in rows.items()]
    ours = [row for name, row in rows.items() if name.startswith("timm.")]
    some = sum(bool(row.get("converted")) for row in ours)
    table = markdown("module or class | converted by | attentions > | trained | exported | what stays, and why", lines)
    return f"Of {len(ours)} modules of timm with attention {some} were converted.\n\n{table}"


def fixed() -> str:
    """Each fixed function of the scores that an attention may be."""
    lines = [
        (f"`{name}`", function.formula, f"[{function.paper}](https://arxiv.org/abs/{function.paper})")
        for name, function in FIXED.items()
    ]
    return markdown("`attention=` | σ(A) | paper", lines)


def compiled() -> str:
    """The Triton kernels on each chip, before and after: instructions a score over all kernels, then every kernel."""
    tokens = 197
    rows = [
        (when, row)
        for when, name in (("before", "compiled-before"), ("after", "compiled"))
        for row in read(f"performance/{name}.json")["rows"]
    ]
    chips, cases = (list(dict.fromkeys(row[key] for _, row in rows)) for key in ("chip", "case"))

    def padded(row: dict[str, Any]) -> float:
        queries, keys = (-(-tokens // size) * size for size in row["tile"][:2])
        return float(row["instructions a score"]) * queries * keys / tokens**2

    def chosen(when: str, chip: str, case: str) -> list[dict[str, Any]]:
        return [row for at, row in rows if (at, row["chip"], row["case"]) == (when, chip, case)]

    def sums(case: str, chip: str) -> tuple[object, ...]:
        both = [chosen(when, chip, case) for when in ("before", "after")]
        issued = [f"{sum(map(padded, kernels)):.0f}" for kernels in both] if not chip.startswith("gfx") else ["", ""]
        return (case, chip, *(max(row["spilled"] for row in kernels) for kernels in both), *issued)

    columns = "attention | chip | most bytes spilled, before > | after > | instructions a score, before > | after >"
    short = markdown(columns, (sums(case, chip) for case in cases for chip in chips))
    columns = "chip | attention | kernel | | tile, warps, stages | registers > | spilled, bytes > | shared, KiB >"
    every = markdown(
        columns,
        (
            (chip, case, row["kernel"], when, "×".join(map(str, row["tile"][:2])) + ", {}, {}".format(*row["tile"][2:]),
             row["registers"], row["spilled"], f"{row['shared'] / 1024:.0f}")
            for chip in chips for case in cases for when in ("before", "after") for row in chosen(when, chip, case)
        ),
    )  # fmt: skip
    return f"{short}\n\n<details markdown>\n<summary>Every kernel</summary>\n\n{every}\n\n</details>"


TABLES: dict[str, Callable[[], str]] = {
    "compiled": compiled,
    "published": published,
    "cost": cost,
    "rates": rates,
    "layer-rates": layer_rates,
    "stability": stability,
    "science": science,
    "starts": starts,
    "start-effects": starts_answer.effects,
    "start-pairs": deciding,
    "wider": wider,
    "longer": longer,
    "score-tasks": score_tasks,
    "served": served,
    "fixed": fixed,
}


def filled(page: str) -> str:
    """A page with its tables as they are made now. Raises KeyError for a table that isn't known."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> None:
    """Write the tables of every page."""
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (now := filled(page)) != page:
            path.write_text(now, encoding="utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
