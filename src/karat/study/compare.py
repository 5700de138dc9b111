"""Several attentions, MLPs and models trained on the same data with the same seeds: one table, one figure, one JSON."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from karat import runs
from karat.basis.specs import parse_call
from karat.data.splits import Opener
from karat.errors import TrainingDiverged
from karat.models.flops import multiply_adds, teacher_multiply_adds
from karat.models.kan.mlp import parse_mlp
from karat.models.kan.peers import DEEP_KAN
from karat.operator.config import KArAtConfig
from karat.plots import draw_epochs, save
from karat.runs import files
from karat.runs.classification import Settings, resolve
from karat.runs.model import build_model, input_size
from karat.runs.settings import slug
from karat.study.statistics import Mean
from karat.train import randomness
from karat.train.classify import Classification
from karat.train.engine import Trainer

FIGURE = "curves.png"
PANELS = {"train_loss": "training loss", "top1": "top-1 on the evaluation images (%)"}


@dataclass(frozen=True)
class ComparisonRow:
    """One contender's result over its seeds."""

    attention: str  # its name as it was given: attention, attention/MLP, or model/attention/MLP
    top1: float  # %, mean over the seeds
    top1_deviation: float | None  # sample deviation; None with one seed
    best_top1: float
    parameters: int
    multiply_adds: int  # of one image's forward pass, matrix products alone, without a frozen teacher's
    ms_per_step: float  # median, loading included
    seconds_per_epoch: float
    peak_memory_mib: float
    runs: list[str]


def compare(
    attentions: Sequence[str],
    settings: Settings,
    *,
    seeds: int = 1,
    console: Console | None = None,
    opened: Opener | None = None,
) -> list[ComparisonRow]:
    """Train every contender from `settings`, with seeds seed, seed+1, ...; write table, JSON and curves to its output.

    Data, order, augmentation and the initialisation of what the models share depend on the seed alone.
    A run that diverges is said and the others go on; what is written is of those that did not.

    Raises ValueError for a contender named twice or unknown, models that take images of different sizes, or seeds < 1,
    and TrainingDiverged, when all is written, where a run diverged.
    """
    console = console or Console(quiet=True)
    opened = opened or Opener()
    settings = resolve(settings, opened)
    if not attentions:
        raise ValueError("nothing to compare: name at least one attention, e.g. softmax g3b g3u")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: give 1 or more")
    chosen = {attention: contender(attention, settings) for attention in attentions}
    _check(list(attentions), chosen)
    check_models(chosen)
    folder = runs.choose_folder(settings, runs.compare_folder(settings))
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in attentions}
    operations, failed, task = {}, list[Path](), Classification(opened)
    for seed in range(settings.seed, settings.seed + seeds):
        for attention in attentions:
            output = folder / f"{slug(attention)}-s{seed}"
            own = replace(chosen[attention], seed=seed, output=output)
            trainer = Trainer(task, own, console=console)
            with noted(output, failed, trainer.console):
                summaries[attention].append(trainer.fit())
            main = trainer.main
            if main and attention not in operations:
                operations[attention] = count_operations(own, trainer.data.num_classes, trainer.data.in_chans)
    rows = [summarise(name, found, operations.get(name, 0)) for name, found in summaries.items() if found]
    if main and rows:
        files.write_json(
            folder / runs.COMPARISON,
            {"settings": settings.as_dict(), "seeds": seeds, "rows": [asdict(r) for r in rows]},
        )
        histories = {row.attention: [runs.read_history(Path(run)) for run in row.runs] for row in rows}
        save(draw_epochs(histories, PANELS), folder / FIGURE)
        console.print(table(rows))
        console.print(f"curves: {folder / FIGURE}\ntable:  {folder / runs.COMPARISON}", highlight=False, soft_wrap=True)
    refuse_diverged([folder.name for folder in failed])
    return rows


@contextmanager
def noted(folder: Path, failed: list[Path], console: Console) -> Iterator[None]:
    """Within, a run that diverges is said, and its folder kept in `failed`: what comes after goes on."""
    try:
        yield
    except TrainingDiverged as error:
        failed.append(folder)
        console.print(f"note: {folder.name} diverged: {error}", markup=False, highlight=False, soft_wrap=True)


def refuse_diverged(names: Collection[str]) -> None:
    """TrainingDiverged where there are such runs: the last word, when the others are trained and shown."""
    if names:
        raise TrainingDiverged(f"training diverged: {', '.join(names)}")


def contender(name: str, settings: Settings) -> Settings:
    """The settings of the contender that `name` means; what it leaves open is as in `settings`.

    ATTENTION, ATTENTION/MLP, MODEL, MODEL/ATTENTION or MODEL/ATTENTION/MLP, where MODEL is a name that
    `karat.create_model` knows, with settings in parentheses where it takes them. Sizes are common to all, except that
    a deep KAN has no patches, depth or heads.

    Raises ValueError for an unknown attention, MLP or model.

    >>> chosen = contender("softmax/kan(grid=5)", Settings(model="vit_tiny_patch16_224"))
    >>> chosen.attention, chosen.mlp
    ('softmax', 'kan(grid=5)')
    >>> contender("deep_kan(order=5,layers=(10,10))", Settings(patch_size=4)).patch_size is None
    True
    """
    if name.endswith(".toml"):
        raise ValueError(f"{name} is no attention; a study's file goes behind --study")
    first, *rest = pieces = name.split("/")
    model = first.partition("(")[0].partition(".")[0]
    if timm.is_model(model):
        if "(" in first:
            parse_call(first)  # an unreadable one is refused before any training
        settings = replace(settings, model=first)
        pieces = rest or ["softmax"]
    if settings.model.partition("(")[0] == DEEP_KAN:
        settings = replace(settings, patch_size=None, embed_dim=None, depth=None, num_heads=None)
    if len(pieces) > 2:
        raise ValueError(f"can't read the contender {name!r}: write ATTENTION, ATTENTION/MLP or MODEL/ATTENTION/MLP")
    attention, mlp = pieces[0], pieces[1] if len(pieces) == 2 else settings.mlp
    parse_mlp(mlp)
    return replace(settings, attention=str(KArAtConfig.parse(attention)), mlp=mlp)


def _check(names: Sequence[str], chosen: dict[str, Settings]) -> None:
    """Raise ValueError for a contender named twice, or two whose images differ in size."""
    seen: list[tuple[str, str, str]] = []
    for name in names:
        s = chosen[name]
        if (s.model, s.attention, s.mlp) in seen:
            raise ValueError(f"{name} is named twice")
        seen.append((s.model, s.attention, s.mlp))
    sides = {s.img_size or input_size(s.model): s.model for s in chosen.values()}
    if len(sides) > 1:
        (side, model), (other, second) = list(sides.items())[:2]
        raise ValueError(f"{model} takes images of {side} pixels and {second} of {other}: give --img-size")


def check_models(variants: Mapping[str, Settings]) -> None:
    """Build each variant's model once, so that one which can't be built is refused before hours of training.

    Raises ValueError, naming the variant.
    """
    for name, settings in variants.items():
        try:
            with randomness.aside(0):
                build_model(settings, settings.num_classes or 10, 3)
        except ValueError as error:
            raise ValueError(f"variant {name!r}: {error}") from None


def count_operations(settings: Settings, num_classes: int, in_chans: int) -> int:
    """Multiply-adds of one image's forward pass through the model of a run; its random states stay as they are.

    A student's are its own: as with its parameters, its frozen teacher's are left out.
    """
    side = settings.img_size or input_size(settings.model)
    with randomness.aside(settings.seed):
        model = build_model(settings, num_classes, in_chans)
    image = torch.zeros(1, in_chans, side, side)
    return multiply_adds(model, image) - teacher_multiply_adds(model, image)


def summarise(attention: str, summaries: Sequence[dict[str, Any]], operations: int) -> ComparisonRow:
    """Mean and deviation over the runs of one contender."""
    top1 = Mean.of([summary["top1"] for summary in summaries])
    return ComparisonRow(
        attention=attention,
        top1=top1.mean,
        top1_deviation=top1.deviation,
        best_top1=statistics.fmean(summary["best"]["top1"] for summary in summaries),
        parameters=summaries[0]["parameters"],
        multiply_adds=operations,
        ms_per_step=statistics.median(summary["ms_per_step"] for summary in summaries),
        seconds_per_epoch=statistics.median(summary["seconds_per_epoch"] for summary in summaries),
        peak_memory_mib=max(summary["peak_memory_mib"] for summary in summaries),
        runs=[summary["folder"] for summary in summaries],
    )


def table(rows: Sequence[ComparisonRow]) -> Table:
    """The rows for the terminal."""
    drawn = Table(title="comparison", title_justify="left")
    drawn.add_column("attention", overflow="fold")
    for column in ("top-1 %", "best %", "params\nM", "mult-\nadds M", "ms /\nstep", "s /\nepoch", "memory\nMiB"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        deviation = "" if row.top1_deviation is None else f" ± {row.top1_deviation:.2f}"
        drawn.add_row(
            row.attention,
            f"{row.top1:.2f}{deviation}",
            f"{row.best_top1:.2f}",
            f"{row.parameters / 1e6:.3g}",
            f"{row.multiply_adds / 1e6:.3g}",
            f"{row.ms_per_step:.1f}",
            f"{row.seconds_per_epoch:.2f}",
            f"{row.peak_memory_mib:,.0f}",
        )
    return drawn
