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
from rich.console import Console
from rich.table import Table
from torch import nn

from karat import runs
from karat.data.batches import Images
from karat.data.sources import size_of
from karat.data.splits import Data, Opener, load_data
from karat.errors import parse
from karat.models.distill import DistillOptions, FitOptions, distill, fit_operators, measure_blocks
from karat.models.distill.closed_form import check_fits
from karat.models.karatize import karatize
from karat.models.resample import resample_tokens
from karat.operator.config import KArAtConfig
from karat.runs import checkpoint, files
from karat.runs.checkpoint import load_weights
from karat.runs.classification import AUTO, Settings, preset_for, resolve
from karat.runs.model import build_model, data_options, input_size
from karat.runs.recipes import get_recipe
from karat.runs.settings import Device
from karat.train import memory
from karat.train.build import create_accelerator
from karat.train.evaluate import evaluate


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
    images: int = 1024
    """Training images for the closed form."""
    eval_images: int | None = None
    """Evaluation images at most; none: all of them."""
    distill_epochs: int = 0
    """Epochs of layer-wise distillation after the closed form."""
    distill_images: int = 10_000
    """Training images of such an epoch."""
    distill_lr: float = 1e-3
    """Peak rate of its Adam."""
    distill_scope: Literal["operator", "attention"] = "operator"
    """What it trains: the operators, or queries, keys, values and projections too."""
    distill_inputs: Literal["student", "teacher"] = "student"
    """Whose tokens a block sees there."""
    ridge: float = 1e-4
    """Ridge of the regressions, as a share of the mean feature's power."""
    fold: bool = True
    """Centre and scale the scores by folding both into queries and keys."""
    refit_projection: bool = True
    """Fit each output projection too, by least squares."""
    img_size: int | None = None
    """Side of the input images; none: the teacher's own."""
    num_classes: int | None = None
    """Number of classes; none: as many as the data has."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = 0
    """Processes that load data; 0 loads in the main process."""
    seed: int = 0
    """Seed of the choice of images and of what starts at random."""
    device: Device = "auto"
    """auto: the accelerator when there is one."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("batch_size", 1), ("distill_images", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.eval_images is not None and self.eval_images < 1:
            raise ValueError(f"eval_images={self.eval_images} must be at least 1")
        if KArAtConfig.parse(self.attention).is_softmax:
            raise ValueError(
                f"attention={self.attention!r} has softmax like the teacher: name a learnable one, e.g. g3b"
            )
        check_fits(KArAtConfig.parse(self.attention))


def convert_run(options: Convert, console: Console | None = None) -> dict[str, Any]:
    """Convert as `options` say; writes the run and returns its report (also RUN/convert.json).

    Raises ValueError for a teacher that is no softmax model, data whose classes it doesn't have, or a folder that is
    taken.
    """
    console = console or Console(quiet=True)
    fit = FitOptions(options.ridge, options.fold, options.refit_projection)
    tune = DistillOptions(options.distill_epochs, options.distill_lr, options.distill_scope, options.distill_inputs)
    torch.manual_seed(options.seed)
    settings, teacher, facts = _teacher(options)
    folder = runs.choose_folder(settings, runs.default_folder(settings))
    runs.spare(folder, options.teacher, options.checkpoint)
    accelerator = create_accelerator(settings)
    few, data = _data(settings, options)
    if facts is not None and (data.num_classes, data.in_chans) != (facts["num_classes"], facts["in_chans"]):
        raise ValueError(
            f"{settings.data} has {data.num_classes} classes and {data.in_chans} channels, the teacher "
            f"{facts['num_classes']} and {facts['in_chans']}; give data that it was trained on"
        )
    if teacher is None:
        teacher = _from_timm(options, settings, data.num_classes, data.in_chans)
    teacher = teacher.to(accelerator.device).eval()
    student = karatize(copy.deepcopy(teacher), settings.attention).eval()
    images = Images(few, data, accelerator.device)
    held_out = [batch for _, batch in zip(range(-(-512 // options.batch_size)), images.evaluation(), strict=False)]
    report: dict[str, Any] = {"teacher": options.teacher, "attention": settings.attention}
    report["options"] = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()}
    began = time.perf_counter()
    fit_operators(student, teacher, lambda: images.training(options.images), fit, lambda name: console.log(name))
    report["seconds_closed_form"] = time.perf_counter() - began
    report["closed_form"] = evaluate(student, images.labelled(options.eval_images), accelerator)
    if tune.epochs:
        report["closed_form_blocks"] = [asdict(block) for block in measure_blocks(student, teacher, held_out)]
        began = time.perf_counter()
        batches = -(-options.distill_images // options.batch_size)
        report["distill_errors"] = distill(
            student,
            teacher,
            lambda: images.training(options.distill_images, fresh=True),
            tune,
            batches=batches,
            progress=lambda line: console.log(line),
        )
        report["seconds_distill"] = time.perf_counter() - began
    report["blocks"] = [asdict(block) for block in measure_blocks(student, teacher, held_out)]
    report["before"] = evaluate(teacher, images.labelled(options.eval_images), accelerator)
    report["after"] = (
        evaluate(student, images.labelled(options.eval_images), accelerator) if tune.epochs else report["closed_form"]
    )
    report["folder"] = str(folder)
    fitted = evaluate(student, images.labelled_training(options.images), accelerator)
    _write(folder, settings, student, data, report, fitted["eval_loss"])
    console.print(table(report))
    return report


def _teacher(options: Convert) -> tuple[Settings, nn.Module | None, dict[str, Any] | None]:
    """The new run's settings, and the teacher with its facts where it is a run."""
    attention = str(KArAtConfig.parse(options.attention))
    changed: dict[str, Any] = {
        "attention": attention,
        "output": options.output,
        "overwrite": options.overwrite,
        "seed": options.seed,
        "workers": options.workers,
        "device": options.device,
        "resume": None,
        "init": None,
    }
    path = Path(options.teacher).expanduser()
    if runs.is_run(path):
        theirs, facts = runs.read_config(path)
        if theirs.teacher is not None:
            raise ValueError(f"{path} runs on another's attention: nothing to convert; give {theirs.teacher} instead")
        if not KArAtConfig.parse(theirs.attention).leaves_attention:
            raise ValueError(f"{path} has learnable attention already ({theirs.attention}); give one of plain softmax")
        if options.checkpoint is not None:
            raise ValueError("--checkpoint belongs to a timm model; a run has its own weights")
        if options.data not in (None, theirs.data):  # how much of their data they took, and where it lay, goes with it
            changed |= {"data": options.data, "data_fraction": 1.0, "num_samples": None, "data_dir": None}
        settings = replace(theirs, **changed)
        teacher = build_model(theirs, facts["num_classes"], facts["in_chans"])
        load_weights(teacher, runs.read_weights(path, options.weights), str(runs.weights_path(path, options.weights)))
        side = theirs.img_size or input_size(theirs.model)
        if options.img_size is not None and options.img_size != side:
            resample_tokens(teacher, img_size=options.img_size)
            settings = replace(settings, img_size=options.img_size)
        return settings, teacher, facts
    if path.exists() or "/" in options.teacher:
        raise ValueError(f"{options.teacher} is no run's folder; give one, or timm's name of a model")
    if options.data is None:
        raise ValueError(f"{options.teacher} is a timm model: name the images to fit to with --data")
    recipe = get_recipe(preset_for(AUTO, options.data, options.teacher, None))
    settings = Settings(model=options.teacher, data=options.data, img_size=options.img_size, recipe=recipe)
    return resolve(replace(settings, **changed)), None, None


def _from_timm(options: Convert, settings: Settings, num_classes: int, in_chans: int) -> nn.Module:
    softmax = replace(settings, attention="softmax")
    if options.checkpoint is not None:
        model = build_model(softmax, num_classes, in_chans)
        if not options.checkpoint.is_file():
            raise ValueError(f"--checkpoint {options.checkpoint}: no such file; give a safetensors file")
        load_weights(model, files.read_tensors(options.checkpoint), str(options.checkpoint))
        return model
    from karat.models.create import create_model

    try:
        return create_model(
            settings.model,
            "softmax",
            num_classes=num_classes,
            in_chans=in_chans,
            pretrained=True,
            **settings.model_kwargs(),
        )
    except ValueError:
        raise
    except Exception as error:  # timm raises RuntimeError, the Hub's client its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{settings.model}: pretrained weights can't be loaded ({reason}); give them with --checkpoint FILE"
        ) from error


def _data(settings: Settings, options: Convert) -> tuple[Data, Data]:
    """The training images that are needed, a fixed subset, and the evaluation images."""
    opened = Opener()
    source = opened(settings.data, settings.data_dir, settings.num_samples).train
    needed = max(options.images, options.distill_images if options.distill_epochs else 0) + options.batch_size
    fractions = min(settings.data_fraction, needed / max(1, size_of(source))), settings.data_fraction
    found = data_options(
        settings,
        batch_size=options.batch_size,
        workers=options.workers,
        seed=options.seed,
        num_classes=options.num_classes or settings.num_classes,
    )
    few, whole = (load_data(replace(found, fraction=fraction), opened) for fraction in fractions)
    return few, whole


def _write(
    folder: Path, settings: Settings, student: nn.Module, data: Data, report: dict[str, Any], train_loss: float
) -> None:
    """A run's folder like one that was trained for no epoch: config, weights, metrics of the start, the report."""
    count = sum(p.numel() for p in student.parameters())
    settings = replace(settings, output=folder)
    runs.begin(
        folder,
        settings,
        {
            "num_classes": data.num_classes,
            "class_names": list(data.class_names),
            "in_chans": data.in_chans,
            "parameters": count,
            "init": [],
            "converted_from": report["teacher"],
        },
    )
    after = report["after"]
    line = {
        "epoch": 0,
        "step": 0,
        "lr": 0.0,
        "train_loss": train_loss,
        **after,
        "seconds": report["seconds_closed_form"] + report.get("seconds_distill", 0.0),
        "images_per_second": 0.0,
        "peak_memory_mib": memory.peak_mib(torch.device("cpu")),
        "bad_steps": 0,
        "bad_images": data.bad_images,
    }
    files.replace_tensors(folder / checkpoint.MODEL, {n: t.detach().cpu() for n, t in student.state_dict().items()})
    files.write_json(folder / runs.DIGESTS, {checkpoint.MODEL: [files.digest(folder / checkpoint.MODEL)]})
    runs.write_history(folder, [line])
    files.write_json(
        folder / runs.SUMMARY,
        {
            "folder": str(folder),
            "model": settings.model,
            "attention": settings.attention,
            "seed": settings.seed,
            "epochs": 0,
            "finished": True,
            "parameters": count,
            "top1": after["top1"],
            "top5": after["top5"],
            "best": {"top1": after["top1"], "epoch": 0},
            "seconds_per_epoch": 0.0,
            "peak_memory_mib": line["peak_memory_mib"],
        },
    )
    files.write_json(folder / runs.REPORT, report)


def convert(arguments: Sequence[str]) -> None:
    """karat convert."""
    options = parse(lambda: tyro.cli(Convert, args=arguments, prog="karat convert"), "karat convert")
    console = Console()
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
