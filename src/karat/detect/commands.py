"""`karat detect train|eval|predict|compare`: typed dataclasses, parsed by tyro, handed to the modules that act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from karat.detect.recipes import get_recipe
from karat.detect.settings import DetectSettings
from karat.errors import parse
from karat.runs.settings import AUTO, Device
from karat.train.commands import first_options, read_settings, resumed, train_and_say
from karat.values import Count, Folder, Probability, Processes


@dataclass(frozen=True)
class EvaluateDetector:
    """Measure a run's average precision (COCO's, boxes and masks); also saved as RUN/eval.json and detections.json."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    weights: Literal["last", "best", "ema"] = "last"
    """Weights of the last epoch, of the epoch with the highest box AP, or averaged ones."""
    part: Literal["eval", "train"] = "eval"
    """Evaluation images or training images: the run's own, or those of --data."""
    data: str | None = None
    """Another COCO JSON, or folder with one, to evaluate on, with the same categories."""
    images: str | None = None
    """The folder of its images, where it isn't beside the JSON."""
    batch_size: Count | None = None
    """Images per batch; none: the run's own."""
    workers: Processes | None = None
    """Processes that load data; none: as the run had."""
    device: Device | None = None
    """auto: the accelerator when there is one; none: as the run had."""


@dataclass(frozen=True)
class Predict:
    """Draw what a run's detector finds in images: boxes, masks, scores; beside them the truth where it is known."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    weights: Literal["last", "best", "ema"] = "last"
    """Weights of the last epoch, of the epoch with the highest box AP, or averaged ones."""
    score: Probability = 0.5
    """Lowest score that is drawn."""
    output: Folder | None = None
    """The folder of the drawings and of predictions.json; none: RUN/predictions."""
    device: Device | None = None
    """auto: the accelerator when there is one; none: as the run had."""


@dataclass(frozen=True)
class Compare:
    """Put runs side by side: one table of their last figures, one figure of their loss and AP curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders."""
    output: Folder = Path("runs/compare-detect")
    """Where compare.json and curves.png are written."""


def _defaults(arguments: Sequence[str]) -> DetectSettings:
    """The defaults that the command line's own --recipe and --resume imply; all else is left to the full parser."""
    name = first_options(arguments, "recipe")["recipe"] or AUTO
    saved = resumed(DetectSettings, arguments)
    return saved or DetectSettings(recipe=get_recipe("published" if name == AUTO else name))


def train(arguments: Sequence[str]) -> None:
    """karat detect train."""
    prog = "karat detect train"
    settings = parse(lambda: read_settings(DetectSettings, arguments, prog, _defaults(arguments)), prog)
    from karat.detect.task import Detection

    train_and_say(Detection(), settings)


def evaluate(arguments: Sequence[str]) -> None:
    """karat detect eval."""
    parsed = parse(lambda: tyro.cli(EvaluateDetector, args=arguments, prog="karat detect eval"), "karat detect eval")
    from karat.detect.measure import evaluate_run

    result = evaluate_run(**vars(parsed))
    console = Console(markup=False)
    console.print(precision_table(result))
    if "mask_AP" not in result:
        console.print("the objects have no masks: boxes alone are measured")
    console.print(f"{result['images']} images\n{result['said']}", highlight=False, soft_wrap=True)


def precision_table(figures: dict[str, Any]) -> Table:
    """Average precisions for the terminal, a dash where there was nothing of that size to find."""
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    table = Table(title=f"{figures['run']} on {figures['data']} (%)", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for kind in ("box", "mask"):
        if f"{kind}_AP" not in figures:
            continue
        values = [figures.get(f"{kind}_{column}") for column in columns]
        table.add_row(kind, *["–" if value is None else f"{value:.2f}" for value in values])
    return table


def predict(arguments: Sequence[str]) -> None:
    """karat detect predict."""
    parsed = parse(lambda: tyro.cli(Predict, args=arguments, prog="karat detect predict"), "karat detect predict")
    from karat.detect.predict import predict_images

    console = Console(markup=False)
    for path, count in predict_images(**vars(parsed)):
        console.print(f"{path}: {count} found", highlight=False, soft_wrap=True)


def compare(arguments: Sequence[str]) -> None:
    """karat detect compare."""
    parsed = parse(lambda: tyro.cli(Compare, args=arguments, prog="karat detect compare"), "karat detect compare")
    from karat.detect.compare import FIGURE, RESULT, compare_runs, table

    rows = compare_runs(parsed.runs, parsed.output)
    console = Console(markup=False)
    console.print(table(rows))
    places = f"curves: {parsed.output / FIGURE}\ntable:  {parsed.output / RESULT}"
    console.print(places, highlight=False, soft_wrap=True)


# what follows `karat detect` -> (function that takes the rest of the line, what it does)
ACTIONS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (train, "train a detector, or go on with a run"),
    "eval": (evaluate, "measure the average precision of a run"),
    "predict": (predict, "draw what a run's detector finds in images"),
    "compare": (compare, "put runs side by side: one table, one figure of curves"),
}


def detect(arguments: Sequence[str]) -> None:
    """karat detect. Raises ValueError for an action that there isn't."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("karat detect: detection and instance segmentation with learnable attention\n")
        for name, (_, line) in ACTIONS.items():
            print(f"  karat detect {name:<8} {line}")
        print("\nkarat detect ACTION --help lists the options of an action with their defaults.")
        raise SystemExit(0)
    if arguments[0] not in ACTIONS:
        raise ValueError(f"unknown action {arguments[0]!r} of karat detect; there are {', '.join(ACTIONS)}")
    ACTIONS[arguments[0]][0](arguments[1:])
