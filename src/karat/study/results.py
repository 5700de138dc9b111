"""What a study leaves in its folder: the table as JSON and Markdown, and compare.json for what reads comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from karat import runs
from karat.analyze.figures import save
from karat.runs import files
from karat.study import effects, table, trials
from karat.study.compare import summarise
from karat.study.figures import draw_figures
from karat.study.measures import read_measures
from karat.study.plan import Plan, summary_of
from karat.study.rows import VariantRow, make_rows
from karat.study.timing import read_times

STUDY, PAGE = "study.json", "study.md"


def write_results(plan: Plan, console: Console) -> list[VariantRow]:
    """Write study.json, study.md and compare.json from the runs that are finished; print the table.

    Raises ValueError where none is.
    """
    measured = {job.folder.name: read_measures(job.folder) or {} for job in plan.jobs()}
    rows = make_rows(plan, read_times(plan), measured)
    if not any(row.seeds for row in rows):
        raise ValueError(f"no run in {plan.folder} is finished yet: there is nothing to put into a table")
    plan.folder.mkdir(parents=True, exist_ok=True)
    seen = effects.effects(rows)
    found: dict[str, Any] = {"title": plan.title, "baseline": plan.baseline, "rows": [asdict(row) for row in rows]}
    if seen:
        found |= {"effects": [asdict(effect) for effect in seen]}
    if (tried := trials.kept_in(plan.folder)) is not None:
        found |= {"trials": {name: value for name, value in tried.items() if name != "settings"}}
    files.write_json(plan.folder / STUDY, found)
    page = f"{table.markdown(rows, plan.baseline)}\n{table.markdown_curves(rows)}"
    page += f"\n{effects.markdown(seen)}" if seen else ""
    files.write_text(plan.folder / PAGE, page)
    _write_comparison(plan, rows)
    console.print(table.console_table(rows, plan.baseline, plan.title, console.width))
    drawn = draw_figures(rows, plan.baseline)
    paths = [save(figure, plan.folder / f"{name}.png") for name, figure in drawn.items()]
    for path in (plan.folder / STUDY, plan.folder / PAGE, *paths):
        print(path)
    return rows


def _write_comparison(plan: Plan, rows: Sequence[VariantRow]) -> None:
    """compare.json, so that `karat report` and `karat analyze` take the study's folder as they take a comparison's."""
    comparison = []
    for row in rows:
        variant = plan.variant(row.name)
        summaries = (summary_of(plan.job(variant, seed)) for seed in row.seeds)
        if known := [summary for summary in summaries if summary is not None]:
            comparison.append(asdict(summarise(row.name, known, row.multiply_adds or 0)))
    files.write_json(plan.folder / runs.COMPARISON, {"rows": comparison})
