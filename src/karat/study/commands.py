"""`karat compare`: of names on the command line, or of a study's file."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from karat.data.splits import Opener
from karat.errors import parse
from karat.runs.classification import Settings, resolve
from karat.runs.settings import slug
from karat.study import trials
from karat.study.document import Document, Trials, read_document
from karat.study.plan import Plan, common_settings, make_plan, refuse_other_runs, run_folder, summary_of
from karat.train import commands as training
from karat.values import Count


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Train several attentions on the same data with the same seeds; print one table, draw one figure of curves."""

    attentions: tyro.conf.Positional[tuple[str, ...]] = ("softmax", "g3b", "g3u")
    """The attentions to compare, e.g. softmax g3b g3u; with an MLP behind a stroke, e.g. softmax/grkan g3b/kan; or
    whole models, e.g. kat_tiny_patch16_224 "deep_kan(order=3)", with attention and MLP behind strokes if you wish."""
    seeds: Count | None = None
    """Runs of each attention, with seeds seed, seed+1, ... (none: 1, or as a study's file says); from two on the table
    shows mean ± deviation."""
    attention: tyro.conf.Suppress[str] = "softmax"

    study: Path | None = None
    """A study's file (TOML) with settings, seeds and variants, instead of attentions; a run that is finished is not
    trained again, and several processes may work on one study. Attentions, where given, name the variants to train, or
    with --time to time."""
    only_table: bool = False
    """With --study: train and measure nothing, write table and figures from the runs that are finished."""
    time: bool = False
    """With --study: train nothing; time a step of every variant, side by side, and write the table. Let nothing else
    run meanwhile."""
    rounds: Count | None = None
    """With --time: how often each step is timed; the median is kept; none: 9."""
    measure: bool = True
    """With --study: measure sharpness and maps of every run that is finished."""


def compare(arguments: Sequence[str]) -> None:
    """karat compare."""
    path = training.first_options(arguments, "study")["study"]  # it decides what the other options' defaults are
    document = None if path is None else read_document(Path(path))
    opened = Opener()
    common = training.defaults(arguments, opened) if document is None else _common(document, arguments, opened)
    default = _default(common, document)
    prog = "karat compare"
    parsed = parse(lambda: training.read_settings(CompareSettings, arguments, prog, default), prog)
    settings = Settings(**{f.name: getattr(parsed, f.name) for f in fields(Settings)})
    if document is not None and parsed.study is not None:
        if document.trials is not None and settings.recipe.lr != default.recipe.lr:
            raise ValueError(f"--lr {settings.recipe.lr:g}: this study's trials choose the rate; leave it out")
        _study(parsed, document, resolve(settings, opened), opened)
        return
    for name in ("only_table", "time", "rounds", "measure"):
        if getattr(parsed, name) != getattr(CompareSettings, name):
            option = f"{'no-' if getattr(CompareSettings, name) is True else ''}{name.replace('_', '-')}"
            raise ValueError(f"--{option} is of a study: give its file with --study FILE")
    from karat.study.compare import compare as run

    seeds = 1 if parsed.seeds is None else parsed.seeds
    run(parsed.attentions, settings, seeds=seeds, console=Console(markup=False), opened=opened)


def _common(document: Document, arguments: Sequence[str], opened: Opener) -> Settings:
    """The study's common settings; what the command line says of recipe, data, model and start goes before."""
    given = training.first_options(arguments, *training.DECIDING)
    values: dict[str, Any] = dict(document.settings)
    values |= {name: None if value == "None" else value for name, value in given.items() if value is not None}
    return common_settings(values, opened)


def _default(settings: Settings, document: Document | None) -> CompareSettings:
    own: Mapping[str, Any] = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.name != "attention"}
    return CompareSettings(**own) if document is None else CompareSettings(**own, attentions=())


def _study(parsed: CompareSettings, document: Document, common: Settings, opened: Opener) -> None:
    """Train what is missing and write the table."""
    from karat.study.compare import refuse_diverged
    from karat.study.results import write_results
    from karat.study.timing import TIMES, measure_times, read_times, settle
    from karat.study.work import train_all
    from karat.train.processes import refuse_several

    refuse_several("a study trains each run in one process: start karat compare --study several times instead")
    if common.resume is not None or common.overwrite:
        raise ValueError("a study goes on with what its folder holds: leave --resume and --overwrite out")
    _refuse_idle_options(parsed)
    seeds = None
    if parsed.seeds is not None:
        seeds = tuple(range(common.seed, common.seed + parsed.seeds))
    folder = common.output or Path("runs") / f"study-{slug(parsed.study.stem if parsed.study else document.title)}"
    plan = make_plan(document, common, folder, seeds)
    plan.only(parsed.attentions)  # an unknown name is refused before any trial
    without_rate: list[str] = []
    if document.trials is not None:
        if common.held_out:
            raise ValueError(f"trials hold images out, and runs that count none: leave held_out={common.held_out} out")
        rates = _tried(plan, document.trials, parsed, opened)
        if rates is None:
            print(f"the rates are not chosen yet: {folder / trials.TRIALS} comes with the last of their trials")
            return
        for doubt in trials.doubts(plan, rates):
            print(f"note: {doubt}")
        plan = trials.settle(plan, rates)
        without_rate = [variant.name for variant in plan.only(parsed.attentions).variants if variant.name not in rates]
    refuse_other_runs(plan)  # before anything is written
    if not parsed.time:
        plan = settle(plan, read_times(plan))
    chosen = plan.only(parsed.attentions)
    console = Console(markup=False)
    failed: list[Path] = []
    if parsed.time:
        measure_times(plan, only=parsed.attentions, rounds=9 if parsed.rounds is None else parsed.rounds)
        plan = settle(plan, read_times(plan))
        plan.write()
    elif not parsed.only_table:
        failed = train_all(chosen, console=console, measure=parsed.measure, before=plan.write, opened=opened)
    line = f"karat compare --study {parsed.study}" + (f" --output {common.output}" if common.output else "")
    waiting = [variant.name for variant in plan.variants if variant.waits and variant.seeds]
    for name in waiting:
        print(f"note: {name} waits for step times: {line} --time")
    missing = _missing(plan, failed)
    done = any(summary_of(job) is not None for job in plan.jobs())
    if parsed.time and not done:
        print(f"times: {folder / TIMES}")
    elif missing and not parsed.only_table and not parsed.time:
        last = "the process that finishes the last one writes the table"
        if waiting:
            last = "the table is written when step times are measured and the rows that wait are trained too"
        print(
            f"{len(missing)} runs are not finished, the first of them {missing[0]}: {last}; {line} --only-table writes "
            "it of those that are"
        )
    elif done or parsed.only_table:
        write_results(plan, console)
    if not (parsed.only_table or parsed.time):
        refuse_diverged([*(folder.name for folder in failed), *(f"all trials of {name}" for name in without_rate)])


def _tried(plan: Plan, asked: Trials, parsed: CompareSettings, opened: Opener) -> trials.Chosen | None:
    """The rates that trials tell, which are trained first; None where they may not be, or are missing."""
    from karat.study.work import train_all

    chosen, runs, failed = trials.choose(plan, asked), trials.trial_plan(plan, asked), list[Path]()
    while chosen is None and not (parsed.only_table or parsed.time):
        failed = train_all(
            runs, console=Console(markup=False), measure=False, before=runs.write, opened=opened, failed=failed
        )
        chosen = trials.choose(plan, asked, failed)
        if chosen is None:
            time.sleep(5)  # another process trains the last ones
    return chosen


def _refuse_idle_options(parsed: CompareSettings) -> None:
    """ValueError for options that would have nothing to do."""
    if parsed.only_table and parsed.time:
        raise ValueError("--only-table measures nothing, and --time writes the table too: leave one of them out")
    if parsed.only_table and parsed.attentions:
        raise ValueError(f"--only-table writes all rows: leave {', '.join(map(repr, parsed.attentions))} out")
    if not parsed.measure and (parsed.only_table or parsed.time):
        raise ValueError(f"--{'only-table' if parsed.only_table else 'time'} measures no run: leave --no-measure out")
    if parsed.rounds is not None and not parsed.time:
        raise ValueError(f"--rounds {parsed.rounds} is of step times: give it with --time")


def _missing(plan: Plan, failed: Collection[Path]) -> list[str]:
    """The folders of runs that are still to be finished."""
    unfinished = [job.folder for job in plan.jobs() if job.folder not in failed and summary_of(job) is None]
    waiting = [run_folder(plan.folder, v.name, seed) for v in plan.variants if v.waits for seed in v.seeds]
    return [folder.name for folder in [*unfinished, *waiting]]
