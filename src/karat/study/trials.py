"""The learning rate of each variant, chosen on training images that are held out, before any run that counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import TypedDict

from karat.runs import files
from karat.study.document import Trials
from karat.study.plan import Plan, Variant, refuse_other_runs, summary_of, with_epochs
from karat.values import Count, Positive, convert

TRIALS, FOLDER = "trials.json", "trials"


class Choice(TypedDict):
    """A variant's rate, and its top-1 on the held-out images."""

    lr: Positive
    held_out: float


class Row(Choice):
    """One trial."""

    variant: str


class Shorter(TypedDict, total=False):
    """How long a trial is, where that isn't as long as a run that counts."""

    epochs: Count


class Kept(Shorter):
    """What trials.json holds: what was asked for, what was found and what was chosen."""

    images: int
    seed: int
    trials: list[Row]
    chosen: dict[str, Choice]


Chosen = Mapping[str, Choice]


@dataclass(frozen=True)
class Trial:
    """One rate of one variant: the name of its runs, and of the rate's group, whose variants share it."""

    variant: str
    lr: float
    group: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}, lr={self.lr:g}"


def trials_of(plan: Plan, asked: Trials) -> list[Trial]:
    """A trial of every variant with every rate."""
    return [Trial(variant.name, lr, _group(variant, asked.together)) for lr in asked.lr for variant in plan.variants]


def _group(variant: Variant, together: Collection[str]) -> tuple[str, ...]:
    if not variant.levels:
        return (variant.name,)
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


def choose(plan: Plan, asked: Trials, failed: Collection[str] = ()) -> Chosen | None:
    """The rate of each variant that does better, in the mean over its group; None while trials are missing.

    What was found stays, in trials.json, while the same trials are asked for. failed: folders of runs that diverged,
    which count as 0.

    Raises ValueError for trials that were trained under other settings.
    """
    trials, runs = trials_of(plan, asked), trial_plan(plan, asked)
    try:
        refuse_other_runs(runs)
    except ValueError as error:  # what the trials told then would be taken for what they tell now
        raise ValueError(f"{error} and {plan.folder / TRIALS}") from None
    kept, found = kept_in(plan.folder), dict[str, float]()
    how = {"images": asked.held_out, "seed": asked.seed} | ({} if asked.epochs is None else {"epochs": asked.epochs})
    if kept is not None and how == {name: kept[name] for name in ("images", "seed", "epochs") if name in kept}:
        found = {Trial(row["variant"], row["lr"], ()).name: row["held_out"] for row in kept["trials"]}
    for trial in [] if found.keys() == {trial.name for trial in trials} else trials:
        job = runs.job(runs.variant(trial.name), asked.seed)
        summary = {"top1": 0.0} if str(job.folder) in failed else summary_of(job)
        if summary is None:
            return None
        found[trial.name] = float(summary["top1"])
    chosen: dict[str, Choice] = {}
    for trial in trials:
        means = {
            lr: fmean(found[one.name] for one in trials if one.group == trial.group and one.lr == lr) for lr in asked.lr
        }
        lr = max(means, key=means.__getitem__)
        chosen[trial.variant] = {"lr": lr, "held_out": found[replace(trial, lr=lr).name]}
    plan.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"variant": trial.variant, "lr": trial.lr, "held_out": found[trial.name]} for trial in trials]
    told = {**how, "trials": rows, "chosen": chosen}
    if told != kept:
        files.write_json(plan.folder / TRIALS, told)
    return chosen


def settle(plan: Plan, chosen: Chosen) -> Plan:
    """The plan with these rates, and with the variants that stages leave to them: the best of each pattern."""
    variants = []
    for variant in plan.variants:
        recipe = variant.settings.recipe.override(lr=chosen[variant.name]["lr"])
        variants.append(replace(variant, settings=replace(variant.settings, recipe=recipe)))
    return replace(plan, variants=tuple(variants)).settled(lambda pattern: best_of(pattern, chosen))


def best_of(pattern: str, chosen: Chosen) -> str:
    """Of the variants that a pattern names the one that did best on the held-out images."""
    return max((name for name in chosen if fnmatchcase(name, pattern)), key=lambda name: chosen[name]["held_out"])


def kept_in(folder: Path) -> Kept | None:
    """What trials.json says, where there is one. Raises ValueError for what can't be."""
    path = folder / TRIALS
    if not path.is_file():
        return None
    try:
        found: Kept = convert(TRIALS, files.read_json(path), Kept)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it: it is written anew from the trials' runs") from None
    return found
