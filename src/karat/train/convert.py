"""`karat convert`: from a softmax model to a run whose operators imitate its attention."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import nn

from karat import runs
from karat.data.batches import Images
from karat.data.sources import size_of
from karat.data.splits import Data, Opener
from karat.errors import parse
from karat.models.distill import DistillOptions, FitOptions, distill, fit_operators, measure_blocks
from karat.models.distill.closed_form import check_fits
from karat.models.karatize import karatize
from karat.models.resample import resample_tokens
from karat.operator.config import KArAtConfig
from karat.runs import files
from karat.runs.classification import AUTO, OTHER_DATA, Settings, preset_for, resolve
from karat.runs.model import class_names, data_options, input_size
from karat.runs.recipes import get_recipe
from karat.runs.settings import Device
from karat.train import reports
from karat.train.build import create_accelerator
from karat.train.classify import Classification
from karat.train.evaluate import evaluate
from karat.train.processes import refuse_several
from karat.train.snapshot import Progress
from karat.train.teachers import softmax_run, softmax_timm
from karat.values import Below1, Count, Natural, Positive, Processes, Seed, check


@dataclass(frozen=True)
class Convert:
    """Convert a softmax model: fit learnable attention to the attention it replaces; the result is an ordinary run."""

    teacher: tyro.conf.Positional[str]
    """The softmax model: a run's folder, or timm's name of a pretrained ViT, DeiT, ConViT or Swin."""
    attention: str = "g3b"
    """Attention to convert to; with residual=softmax the model stays its teacher: gates or operators start at zero."""
    data: str | None = None
    """Images to fit to, as for karat train; none: the run's own."""
    output: Path | None = None
    """The new run's folder; none: runs/DATA-MODEL-ATTENTION-sSEED."""
    overwrite: bool = False
    """Begin again where the output folder already holds a run."""
    weights: Literal["last", "best", "ema"] = "last"
    """Which weights of a teacher run."""
    checkpoint: Path | None = None
    """Weights of a timm model, a safetensors file with its own names; none: timm's pretrained ones."""
    images: Count = 1024
    """Training images for the closed form."""
    eval_images: Count | None = None
    """Evaluation images at most; none: all of them."""
    distill_epochs: Natural = 0
    """Epochs of layer-wise distillation after the closed form."""
    distill_images: Count = 10_000
    """Training images of such an epoch."""
    distill_lr: Positive = 1e-3
    """Peak rate of its Adam."""
    distill_scope: Literal["operator", "attention"] = "operator"
    """What it trains: the operators, or queries, keys, values and projections too."""
    distill_inputs: Literal["student", "teacher"] = "student"
    """Whose tokens a block sees there."""
    ridge: Below1 = 1e-4
    """Ridge of the regressions, as a share of the mean feature's power."""
    fold: bool = True
    """Centre and scale the scores by folding both into queries and keys."""
    refit_projection: bool = True
    """Fit each output projection too, by least squares."""
    img_size: Count | None = None
    """Side of the input images; none: the teacher's own."""
    num_classes: Count | None = None
    """Number of classes; none: as many as the data has."""
    batch_size: Count = 64
    """Images per batch."""
    workers: Processes = 0
    """Processes that load data; 0 loads in the main process."""
    seed: Seed = 0
    """Seed of the choice of images and of what starts at random."""
    device: Device = "auto"
    """auto: the accelerator when there is one."""

    def __post_init__(self) -> None:
        check(self)
        if KArAtConfig.parse(self.attention).is_softmax:
            raise ValueError(
                f"attention={self.attention!r} has softmax like the teacher: name a learnable one, e.g. g3b"
            )
        check_fits(KArAtConfig.parse(self.attention))
        self.how()  # a value that can't be used is refused before a teacher is looked for

    def how(self) -> tuple[FitOptions, DistillOptions]:
        """How operators are fitted, and how they are distilled."""
        fit = FitOptions(self.ridge, self.fold, self.refit_projection)
        return fit, DistillOptions(self.distill_epochs, self.distill_lr, self.distill_scope, self.distill_inputs)


def convert_run(options: Convert, console: Console | None = None) -> dict[str, Any]:
    """Convert as `options` say; writes the run and returns its report (also RUN/convert.json).

    Raises ValueError for a teacher that is no softmax model, data whose classes it doesn't have, or a folder that is
    taken.
    """
    refuse_several("karat convert runs in one process: leave the launcher out")
    console = console or Console(quiet=True)
    torch.manual_seed(options.seed)
    settings, teacher, facts = _teacher(options)
    folder = runs.choose_folder(settings, runs.default_folder(settings))
    runs.spare(folder, options.teacher, options.checkpoint)
    accelerator = create_accelerator(settings, training=False)
    few, data = _data(settings, options, class_names(facts or {}))
    if facts is not None and (data.num_classes, data.in_chans) != (facts["num_classes"], facts["in_chans"]):
        raise ValueError(
            f"{settings.data} has {data.num_classes} classes and {data.in_chans} channels, the teacher "
            f"{facts['num_classes']} and {facts['in_chans']}; give data that it was trained on"
        )
    if teacher is None:
        teacher = softmax_timm(settings, data.num_classes, data.in_chans, options.checkpoint)
    teacher = teacher.to(accelerator.device).eval()
    student = karatize(copy.deepcopy(teacher), settings.attention).eval()
    images = Images(few, data, accelerator.device)
    report: dict[str, Any] = {"teacher": options.teacher, "attention": settings.attention}
    report["options"] = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()}
    report |= _fit(student, teacher, images, options, accelerator, console)
    report["folder"] = str(folder)
    fitted = evaluate(student, images.labelled_training(options.images), accelerator)
    _write(folder, replace(settings, output=folder), student, data, report, fitted["eval_loss"])
    console.print(table(report))
    return report


def _fit(
    student: nn.Module, teacher: nn.Module, images: Images, options: Convert, accelerator: Accelerator, console: Console
) -> dict[str, Any]:
    """Fit the student's operators, then distil where epochs are asked for; what the report says of it."""
    fit, tune = options.how()
    held_out = [batch for _, batch in zip(range(-(-512 // options.batch_size)), images.evaluation(), strict=False)]

    def blocks() -> list[dict[str, Any]]:
        return [asdict(block) for block in measure_blocks(student, teacher, held_out)]

    def measured(model: nn.Module) -> dict[str, float]:
        return evaluate(model, images.labelled(options.eval_images), accelerator)

    began = time.perf_counter()
    fit_operators(student, teacher, lambda: images.training(options.images), fit, lambda name: console.log(name))
    found: dict[str, Any] = {"seconds_closed_form": time.perf_counter() - began, "closed_form": measured(student)}
    if tune.epochs:
        found["closed_form_blocks"] = blocks()
        began = time.perf_counter()
        found["distill_errors"] = distill(
            student,
            teacher,
            lambda: images.training(options.distill_images, fresh=True),
            tune,
            batches=-(-options.distill_images // options.batch_size),
            progress=lambda line: console.log(line),
        )
        found["seconds_distill"] = time.perf_counter() - began
    found |= {"blocks": blocks(), "before": measured(teacher)}
    return found | {"after": measured(student) if tune.epochs else found["closed_form"]}


def _teacher(options: Convert) -> tuple[Settings, nn.Module | None, dict[str, Any] | None]:
    """The new run's settings, and the teacher with its facts where it is a run."""
    kept = ("output", "overwrite", "seed", "workers", "device")
    changed: dict[str, Any] = {name: getattr(options, name) for name in kept} | {"resume": None, "init": None}
    changed["attention"] = str(KArAtConfig.parse(options.attention))
    path = Path(options.teacher)
    if runs.is_run(path):
        if options.checkpoint is not None:
            raise ValueError("--checkpoint belongs to a timm model; a run has its own weights")
        teacher, theirs, facts = softmax_run(path, options.weights)
        if options.data not in (None, theirs.data):
            changed |= {"data": options.data, **OTHER_DATA}
        if options.img_size not in (None, theirs.img_size or input_size(theirs.model)):
            resample_tokens(teacher, img_size=options.img_size)
            changed["img_size"] = options.img_size
        return replace(theirs, **changed), teacher, facts
    if path.exists() or "/" in options.teacher:
        raise ValueError(f"{options.teacher} is no run's folder; give one, or timm's name of a model")
    if options.data is None:
        raise ValueError(f"{options.teacher} is a timm model: name the images to fit to with --data")
    recipe = get_recipe(preset_for(AUTO, options.data, options.teacher, None))
    settings = Settings(model=options.teacher, data=options.data, img_size=options.img_size, recipe=recipe)
    return resolve(replace(settings, **changed)), None, None


def _data(settings: Settings, options: Convert, classes: tuple[str, ...] | None) -> tuple[Data, Data]:
    """The training images that are needed, a fixed subset, and the evaluation images.

    classes: the teacher's, whose names labels follow; None where it has none.
    """
    opened = Opener()
    source = opened.splits(settings.data, settings.data_dir, settings.num_samples).train
    needed = max(options.images, options.distill_images if options.distill_epochs else 0) + options.batch_size
    fractions = min(settings.data_fraction, needed / max(1, size_of(source))), settings.data_fraction
    found = data_options(
        settings,
        batch_size=options.batch_size,
        workers=options.workers,
        seed=options.seed,
        num_classes=options.num_classes or settings.num_classes,
        classes=classes,
    )
    few, whole = (opened.data(replace(found, fraction=fraction)) for fraction in fractions)
    return few, whole


def _write(
    folder: Path, settings: Settings, student: nn.Module, data: Data, report: dict[str, Any], train_loss: float
) -> None:
    """A run's folder like one that was trained for no epoch: config, weights, metrics of the start, the report."""
    task, count = Classification(), sum(p.numel() for p in student.parameters())
    started = {"parameters": count, "init": [], "converted_from": report["teacher"]}
    runs.begin(folder, settings, task.facts(data) | started)
    spent = report["seconds_closed_form"] + report.get("seconds_distill", 0.0)
    best = {"top1": report["after"]["top1"], "epoch": 0}
    progress = Progress(loss_sum=train_loss, applied=1, seconds=spent, best=best)
    line = reports.epoch_line(progress, report["after"], bad_images=data.bad_images)
    progress.history.append(line)
    runs.write_weights(folder, student.state_dict())
    runs.write_history(folder, progress.history)
    figures = task.summary(progress.history)
    files.write_json(folder / runs.SUMMARY, reports.summary(folder, settings, figures, count, progress, finished=True))
    files.write_json(folder / runs.REPORT, report)


def convert(arguments: Sequence[str]) -> None:
    """karat convert."""
    options = parse(lambda: tyro.cli(Convert, args=arguments, prog="karat convert"), "karat convert")
    console = Console(markup=False)
    report = convert_run(options, console)
    console.print(f"run: {report['folder']}", highlight=False, soft_wrap=True)


def table(report: dict[str, Any]) -> Table:
    """The report for the terminal."""
    drawn = Table(title=f"{report['teacher']} to {report['attention']}", title_justify="left")
    drawn.add_column("block")
    for column in ("explained %", "by a fixed row %", "output followed %"):
        drawn.add_column(column, justify="right")
    for block in report["blocks"]:
        numbers = (f"{100 * block[name]:.1f}" for name in ("explained", "fixed", "followed"))
        drawn.add_row(block["name"], *numbers)
    drawn.caption = f"top-1 {report['before']['top1']:.2f} % before, {report['after']['top1']:.2f} % converted"
    return drawn
