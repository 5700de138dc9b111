"""The learning rate of each variant, chosen on training images that are held out, before any run that counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from karat.runs import files
from karat.study.document import Trials
from karat.study.plan import Plan, Variant, summary_of

TRIALS, FOLDER = "trials.json", "trials"
Chosen = Mapping[str, Mapping[str, Any]]  # by variant: its "lr" and "held_out", top-1 on the held-out images


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
        settings = plan.variant(trial.variant).settings
        settings = replace(settings, held_out=asked.held_out, recipe=settings.recipe.override(lr=trial.lr))
        variants.append(Variant(trial.name, settings, (asked.seed,)))
    return Plan(f"{plan.title}: trials", plan.folder / FOLDER, variants[0].name, tuple(variants))


def choose(plan: Plan, asked: Trials, failed: Collection[str] = ()) -> Chosen | None:
    """The rate of each variant that does better, in the mean over its group; None while trials are missing.

    What was chosen stays, in trials.json. failed: folders of runs that diverged, which count as 0.
    """
    path = plan.folder / TRIALS
    if path.is_file():
        kept: Chosen = files.read_json(path)["chosen"]
        if set(kept) == {variant.name for variant in plan.variants}:
            return kept
    trials, runs = trials_of(plan, asked), trial_plan(plan, asked)
    found: dict[str, float] = {}
    for trial in trials:
        job = runs.job(runs.variant(trial.name), asked.seed)
        summary = {"top1": 0.0} if str(job.folder) in failed else summary_of(job)
        if summary is None:
            return None
        found[trial.name] = float(summary["top1"])
    chosen: dict[str, dict[str, Any]] = {}
    for trial in trials:
        means = {
            lr: fmean(found[one.name] for one in trials if one.group == trial.group and one.lr == lr) for lr in asked.lr
        }
        lr = max(means, key=means.__getitem__)
        chosen[trial.variant] = {"lr": lr, "held_out": found[replace(trial, lr=lr).name]}
    plan.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"variant": trial.variant, "lr": trial.lr, "held_out": found[trial.name]} for trial in trials]
    files.write_json(path, {"images": asked.held_out, "seed": asked.seed, "trials": rows, "chosen": chosen})
    return chosen


def settle(plan: Plan, chosen: Chosen) -> Plan:
    """The plan with these rates, and with the variants that stages leave to them: the best of each pattern."""
    variants = []
    for variant in plan.variants:
        recipe = variant.settings.recipe.override(lr=chosen[variant.name]["lr"])
        variants.append(replace(variant, settings=replace(variant.settings, recipe=recipe)))
    return replace(plan, variants=tuple(variants)).in_stages(lambda pattern: best_of(pattern, chosen))


def best_of(pattern: str, chosen: Chosen) -> str:
    """Of the variants that a pattern names the one that did best on the held-out images."""
    return max((name for name in chosen if fnmatchcase(name, pattern)), key=lambda name: chosen[name]["held_out"])


def kept_in(folder: Path) -> dict[str, Any] | None:
    """What trials.json says, where there is one."""
    return files.read_json(folder / TRIALS) if (folder / TRIALS).is_file() else None
