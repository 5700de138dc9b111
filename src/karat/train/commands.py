"""The commands that train and evaluate: each one typed dataclass, parsed by tyro, handed to the module that acts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from rich.console import Console

from karat import runs
from karat.data.splits import Opener
from karat.errors import parse
from karat.runs.classification import AUTO, Settings, preset_for
from karat.runs.recipes import get_recipe
from karat.runs.renamed import renamed_options
from karat.runs.settings import Device, RunSettings
from karat.values import Count, Processes, at_home, local_path

if TYPE_CHECKING:
    from karat.train.task import Task

S = TypeVar("S", bound=RunSettings)
DECIDING = ("recipe", "data", "model", "init")  # what other options' defaults depend on


@dataclass(frozen=True)
class Evaluate:
    """Measure top-1 and top-5 of a run's weights; also saved as RUN/eval.json."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    weights: Literal["last", "best", "ema"] = "last"
    """Weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    data: str | None = None
    """Another data set to evaluate on; none: the run's own evaluation images."""
    img_size: Count | None = None
    """Another input size: position embeddings and operators are resampled; none: the run's own."""
    batch_size: Count | None = None
    """Images per batch; none: the run's own."""
    workers: Processes | None = None
    """Processes that load data; none: as the run had."""
    device: Device | None = None
    """auto: the accelerator when there is one; none: as the run had."""


def defaults(arguments: Sequence[str], opened: Opener | None = None) -> Settings:
    """The defaults that the command line's own --recipe, --data, --init, --model and --resume imply.

    They decide what the other options' defaults are, so they are read first; all else is left to the full parser.
    opened: what opens the data, whose images may decide.
    """
    given, saved = first_options(arguments, *DECIDING), resumed(Settings, arguments)
    if saved is not None:
        return saved
    init = None if given["init"] == "None" else given["init"]
    name = preset_for(given["recipe"] or AUTO, given["data"] or "digits", given["model"] or AUTO, init, opened)
    return Settings(recipe=get_recipe(name))


def first_options(arguments: Sequence[str], *names: str) -> dict[str, str | None]:
    """These options as they stand on the command line, read before all others; None for one that is not given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", nargs="?")  # a value that is missing is the full parser's to complain of
    known, _ = first.parse_known_args(list(arguments))
    return {name: None if (given := getattr(known, name)) is None else at_home(given) for name in names}


def resumed(kind: type[S], arguments: Sequence[str]) -> S | None:
    """The settings of the run that --resume goes on with, of --output's where it is auto; None for a new run."""
    given = first_options(arguments, "resume", "output")
    resume = given["resume"]
    asked = given["output"] if resume == AUTO else resume
    folder = None if asked is None else Path(asked)
    if resume is None or folder is None or not runs.is_run(folder):
        return None
    return replace(runs.read_config(folder, kind)[0], resume=resume, output=folder, overwrite=False)


def read_settings(kind: type[S], arguments: Sequence[str], command: str, default: S) -> S:
    """A run's settings: `default` changed by the arguments, under old names too."""
    return tyro.cli(kind, args=renamed_options(arguments, default.recipe.lr), prog=command, default=default)


def train(arguments: Sequence[str]) -> None:
    """karat train."""
    prog, opened = "karat train", Opener()
    _train(parse(lambda: read_settings(Settings, arguments, prog, defaults(arguments, opened)), prog), opened)


def _train(settings: Settings, opened: Opener) -> None:
    from karat.train.classify import Classification

    train_and_say(Classification(opened), settings)


def train_and_say(task: Task[Any, Any], settings: RunSettings) -> None:
    """Train to the end on the terminal, and say how it ended."""
    from karat.train.engine import Trainer

    trainer = Trainer(task, settings, console=Console(markup=False))
    summary = trainer.fit()
    trainer.say(f"finished: {task.result(summary)}, {summary['parameters']:,} parameters\nrun: {summary['folder']}")


def transfer(arguments: Sequence[str]) -> None:
    """karat transfer TEACHER_RUN [options of karat train]."""
    name, rest = (None, arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    wants_help = bool({"-h", "--help"} & set(arguments))
    if name is None and not wants_help:
        raise ValueError("name the teacher's run first: karat transfer TEACHER_RUN [options of karat train]")
    prog, opened = "karat transfer TEACHER_RUN", Opener()
    default = Settings() if name is None else _student_defaults(local_path(name), rest, opened)
    _train(parse(lambda: read_settings(Settings, rest, prog, default), prog), opened)


def _student_defaults(teacher: Path, arguments: Sequence[str], opened: Opener) -> Settings:
    from karat.train.transfer import student_defaults

    saved = defaults(arguments, opened)
    if saved.resume is not None:
        _check_teacher(teacher, saved)
        return saved
    given = [word[2:].partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]
    asked = first_options(arguments, *DECIDING)
    student = student_defaults(teacher, given, asked["model"])
    if student.preset != AUTO:
        return student
    data, model = asked["data"] or student.data, asked["model"] or student.model
    name = preset_for(asked["recipe"] or AUTO, data, model, None, opened)
    return replace(student, recipe=get_recipe(name))


def _check_teacher(teacher: Path, saved: Settings) -> None:
    """Raise ValueError where a run goes on with another teacher than its own, or has none."""
    folder = Path(str(saved.output))
    if saved.teacher is None:
        raise ValueError(f"{folder} has no teacher: go on with karat train --resume {folder}")
    kept = folder / runs.TEACHER
    if teacher.resolve() not in (Path(saved.teacher).resolve(), kept.resolve()):
        raise ValueError(f"{folder} learns from {saved.teacher}, not {teacher}: name that, or its copy {kept}")


def evaluate(arguments: Sequence[str]) -> None:
    """karat eval."""
    parsed = parse(lambda: tyro.cli(Evaluate, args=arguments, prog="karat eval"), "karat eval")
    from karat.train.measure import evaluate_run

    result = evaluate_run(**vars(parsed))
    Console(markup=False).print(
        f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  loss {result['eval_loss']:.4f}  "
        f"({result['images']} images)\n{result['said']}",
        highlight=False,
        soft_wrap=True,
    )
