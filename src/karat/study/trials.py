"""The learning rate of each variant, chosen on training images that are held out, before any run that counts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from karat import runs
from karat.runs import files
from karat.runs.classification import Settings
from karat.runs.settings import first_change
from karat.study.document import Trials
from karat.study.plan import Job, Plan, Variant, summary_of, with_epochs
from karat.values import Count, Positive, convert

TRIALS, FOLDER = "trials.json", "trials"


class Choice(TypedDict):
    """A variant's rate, and its top-1 on the held-out images; 0 where that trial diverged."""

    lr: Positive
    held_out: float


class Row(TypedDict):
    """One trial; no top-1: it diverged, which earlier versions wrote as 0."""

    variant: str
    lr: Positive
    held_out: float | None


class _Perhaps(TypedDict, total=False):
    """epochs: of a trial, where it isn't as long as a run that counts. settings: of each variant's trials, whatever
    their rate; unknown of what earlier versions wrote."""

    epochs: Count
    settings: dict[str, dict[str, Any]]


class Kept(_Perhaps):
    """What trials.json holds: what was asked for, what was found and what was chosen."""

    images: int
    seed: int
    trials: list[Row]
    chosen: dict[str, Choice]


Chosen = Mapping[str, Choice]


@dataclass(frozen=True)
class Trial:
    """One rate of one variant: the name of its runs, and the rate's group, whose variants share it."""

    variant: str
    lr: float
    group: tuple[str, ...] | str

    @property
    def name(self) -> str:
        return f"{self.variant}, lr={self.lr:g}"


def trials_of(plan: Plan, asked: Trials) -> list[Trial]:
    """A trial of every variant with every rate."""
    return [Trial(variant.name, lr, _group(variant, asked.together)) for lr in asked.lr for variant in plan.variants]


def _group(variant: Variant, together: Collection[str]) -> tuple[str, ...] | str:
    if not variant.levels:
        return variant.name
    return tuple(level for factor, level in variant.levels.items() if factor not in together)


def trial_plan(plan: Plan, asked: Trials) -> Plan:
    """The trials' runs as a study of their own, in a folder of this one's."""
    variants = []
    for trial in trials_of(plan, asked):
        variant = plan.variant(trial.variant)
        settings = (variant if asked.epochs is None else with_epochs(variant, asked.epochs)).settings
        settings = replace(settings, held_out=asked.held_out, recipe=settings.recipe.override(lr=trial.lr))
        variants.append(Variant(trial.name, settings, (asked.seed,)))
    return Plan(f"{plan.title}: trials", plan.folder / FOLDER, variants[0].name, tuple(variants))


def choose(plan: Plan, asked: Trials, failed: Collection[Path] = ()) -> Chosen | None:
    """The rate of each variant that does better, in the mean over its group; None while trials are missing.

    Trials that diverge count as 0; a variant of which all do has no rate. What was found stays, in trials.json, while
    the same trials are asked for. failed: folders of runs that diverged.

    Raises ValueError for trials that were trained under other settings.
    """
    trials, path = trials_of(plan, asked), plan.folder / TRIALS
    jobs = dict(zip(trials, trial_plan(plan, asked).jobs(), strict=True))
    try:
        summaries = {trial: summary_of(job) for trial, job in jobs.items()}
    except ValueError as error:  # what the trials told then would be taken for what they tell now
        raise ValueError(f"{error} and {path}") from None
    kept, found = kept_in(plan.folder), dict[tuple[str, float], float | None]()
    how = {"images": asked.held_out, "seed": asked.seed} | ({} if asked.epochs is None else {"epochs": asked.epochs})
    if kept is not None and how == {name: kept[name] for name in ("images", "seed", "epochs") if name in kept}:
        found = {(row["variant"], row["lr"]): row["held_out"] for row in kept["trials"]}
    settings = {trial.variant: job.settings.as_dict() for trial, job in jobs.items()}  # as seen above, of their runs
    if kept is not None and found.keys() == {(trial.variant, trial.lr) for trial in trials}:
        if "settings" in kept or not all(runs.is_run(job.folder) for job in jobs.values()):
            settings = _settings_of(kept, jobs, path)
    else:
        for trial, job in jobs.items():
            summary = {"top1": None} if job.folder in failed else summaries[trial]
            if summary is None:
                return None
            found[trial.variant, trial.lr] = summary["top1"]
    chosen: dict[str, Choice] = {}
    for variant, group in {trial.variant: trial.group for trial in trials}.items():
        alike = {trial.variant for trial in trials if trial.group == group}
        means = {lr: fmean(found[one, lr] or 0.0 for one in alike) for lr in asked.lr}
        lr = max(means, key=means.__getitem__)
        if any(found[variant, lr] is not None for lr in asked.lr):
            chosen[variant] = {"lr": lr, "held_out": found[variant, lr] or 0.0}
    plan.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"variant": trial.variant, "lr": trial.lr, "held_out": found[trial.variant, trial.lr]} for trial in trials]
    told = {**how, "trials": rows, "chosen": chosen} | ({"settings": settings} if settings else {})
    if told != kept:
        files.write_json(path, told)
    return chosen


def _settings_of(kept: Kept, jobs: Mapping[Trial, Job], path: Path) -> dict[str, dict[str, Any]]:
    """Under which the rates that are kept were chosen, by variant; nothing, and a line, where that isn't known.

    Raises ValueError where they are others now.
    """
    if "settings" not in kept:
        print(f"note: {path} is of an earlier version: it doesn't say under which settings its rates were chosen")
        return {}
    for trial, job in jobs.items():
        before = Settings.from_dict(kept["settings"][trial.variant])
        change = first_change(replace(before, recipe=before.recipe.override(lr=trial.lr)), job.settings)
        if change is not None:
            raise ValueError(
                f"{path} has rates that were chosen under other settings, of {trial.variant!r}: {change}; give another "
                "--output, or remove that file"
            )
    return kept["settings"]


def settle(plan: Plan, chosen: Chosen) -> Plan:
    """The plan with these rates, and with the variants that stages leave to them: the best of each pattern.

    A variant without a rate has no runs.
    """
    plan = plan.settled(lambda pattern: best_of(pattern, chosen))
    variants = []
    for variant in plan.variants:
        if variant.name in chosen:
            recipe = variant.settings.recipe.override(lr=chosen[variant.name]["lr"])
            variants.append(replace(variant, settings=replace(variant.settings, recipe=recipe)))
        else:
            variants.append(replace(variant, seeds=(), stages=()))
    return replace(plan, variants=tuple(variants))


def doubts(plan: Plan, chosen: Chosen) -> Iterator[str]:
    """What is to be said of variants whose trials tell little of their rate."""
    for name in (variant.name for variant in plan.variants):
        if name not in chosen:
            yield f"{name} has no rate and no runs, for all its trials diverged: give trials lower rates"
        elif not chosen[name]["held_out"]:
            lr = chosen[name]["lr"]
            yield f"{name} has lr={lr:g}, where its trial got no held-out image right, as one that diverged"


def best_of(pattern: str, chosen: Chosen) -> str | None:
    """Of the variants that a pattern names the one that did best on the held-out images; None: none has a rate."""
    named = (name for name in chosen if fnmatchcase(name, pattern))
    return max(named, key=lambda name: chosen[name]["held_out"], default=None)


def kept_in(folder: Path) -> Kept | None:
    """What trials.json says, where there is one. Raises ValueError for what can't be."""
    path = folder / TRIALS
    if not path.is_file():
        return None
    try:
        found: Kept = convert(TRIALS, files.read_json(path), Kept)
        for row in found["trials"] if "settings" in found else ():
            Settings.from_dict(found["settings"][row["variant"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; remove it: it is written anew from the trials' runs") from None
    return found
