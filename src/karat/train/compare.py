"""Several attentions trained on the same data with the same seeds: one table, one figure, one JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from karat.config import KArAtConfig
from karat.kan.mlp import parse_mlp
from karat.train import files, runs
from karat.train.engine import Trainer
from karat.train.run_settings import slug
from karat.train.settings import Settings, resolve

RESULT, FIGURE = "compare.json", "curves.png"


@dataclass(frozen=True)
class Row:
    """One attention's result over its seeds."""

    attention: str
    top1: float  # %, mean over the seeds
    top1_deviation: float | None  # sample deviation; None with one seed
    best_top1: float
    parameters: int
    seconds_per_epoch: float
    peak_memory_mib: float
    runs: list[str]


def compare(
    attentions: Sequence[str], settings: Settings, *, seeds: int = 1, console: Console | None = None
) -> list[Row]:
    """Train every attention from `settings`, with seeds seed, seed+1, ...; write table, JSON and curves to its output.

    Data, order, augmentation and the initialisation of what the models share depend on the seed alone.
    Raises ValueError for an attention named twice or unknown, or seeds < 1.
    """
    console = console or Console(quiet=True)
    settings = resolve(settings)
    if not attentions:
        raise ValueError("nothing to compare: name at least one attention, e.g. softmax g3b g3u")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: give 1 or more")
    chosen = {attention: contender(attention, settings.mlp) for attention in attentions}
    names = ["/".join(chosen[attention]) for attention in attentions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{attentions[names.index(twice)]} is named twice")
    folder = runs.choose_folder(settings, runs.compare_folder(settings))
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in attentions}
    for seed in range(settings.seed, settings.seed + seeds):
        data = None
        for attention in attentions:
            output = folder / f"{slug(attention)}-s{seed}"
            form, mlp = chosen[attention]
            trainer = Trainer(
                replace(settings, attention=form, mlp=mlp, seed=seed, output=output), data=data, console=console
            )
            data = trainer.data
            summaries[attention].append(trainer.fit())
            main = trainer.main
    rows = [summarise(attention, found) for attention, found in summaries.items()]
    if main:
        files.write_json(
            folder / RESULT, {"settings": settings.as_dict(), "seeds": seeds, "rows": [asdict(r) for r in rows]}
        )
        histories = {row.attention: [runs.read_history(Path(run)) for run in row.runs] for row in rows}
        draw(histories, folder / FIGURE)
        console.print(table(rows))
        console.print(f"curves: {folder / FIGURE}\ntable:  {folder / RESULT}", highlight=False, soft_wrap=True)
    return rows


def contender(name: str, mlp: str = "mlp") -> tuple[str, str]:
    """The attention and the MLP that "g3b" or "g3b/grkan" means; `mlp` where the name has none.

    Raises ValueError for an unknown attention or MLP.

    >>> contender("softmax/kan(grid=5)")
    ('softmax', 'kan(grid=5)')
    """
    attention, _, own = name.partition("/")
    parse_mlp(own or mlp)  # an unknown one is refused before any training
    return str(KArAtConfig.parse(attention)), own or mlp


def summarise(attention: str, summaries: Sequence[dict[str, Any]]) -> Row:
    """Mean and deviation over the runs of one attention."""
    accuracy = [summary["top1"] for summary in summaries]
    return Row(
        attention=attention,
        top1=statistics.fmean(accuracy),
        top1_deviation=statistics.stdev(accuracy) if len(accuracy) > 1 else None,
        best_top1=statistics.fmean(summary["best"]["top1"] for summary in summaries),
        parameters=summaries[0]["parameters"],
        seconds_per_epoch=statistics.median(summary["seconds_per_epoch"] for summary in summaries),
        peak_memory_mib=max(summary["peak_memory_mib"] for summary in summaries),
        runs=[summary["folder"] for summary in summaries],
    )


def table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal."""
    drawn = Table(title="comparison", title_justify="left")
    drawn.add_column("attention")
    for column in ("top-1 %", "best %", "parameters", "s / epoch", "peak memory MiB"):
        drawn.add_column(column, justify="right")
    for row in rows:
        deviation = "" if row.top1_deviation is None else f" ± {row.top1_deviation:.2f}"
        drawn.add_row(
            row.attention,
            f"{row.top1:.2f}{deviation}",
            f"{row.best_top1:.2f}",
            f"{row.parameters:,}",
            f"{row.seconds_per_epoch:.2f}",
            f"{row.peak_memory_mib:,.0f}",
        )
    return drawn


def draw(histories: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Training loss and top-1 per epoch, one colour an attention, one line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for index, (attention, seeds) in enumerate(histories.items()):
        for number, lines in enumerate(seeds):
            epochs = [line["epoch"] for line in lines]
            for panel, value in zip(panels, ("train_loss", "top1"), strict=True):
                label = attention if number == 0 else None
                panel.plot(epochs, [line[value] for line in lines], color=f"C{index}", label=label, linewidth=1.4)
    for panel, title in zip(panels, ("training loss", "top-1 on the evaluation images (%)"), strict=True):
        panel.set_xlabel("epoch")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[1].legend(frameon=False)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=150, format="png")
    draft.replace(path)
