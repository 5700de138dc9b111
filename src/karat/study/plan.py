"""What a study's file asks for: variants with all their settings, and the runs of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from karat import runs
from karat.data.splits import Opener
from karat.runs import files, renamed
from karat.runs.classification import Settings, resolve
from karat.runs.recipes import Recipe
from karat.runs.settings import first_change, slug
from karat.study.compare import contender
from karat.study.document import Document, Stage, VariantEntry

PLAN = "plan.json"


@dataclass(frozen=True)
class Variant:
    """One row: all settings of its runs but seed and folder.

    waits: its number of epochs is still to be worked out, from step times, so that it trains as long as
    `equal_time_to`. levels: of the study's factors. stages: in which stage each seed's run comes; nothing: the first.
    """

    name: str
    settings: Settings
    seeds: tuple[int, ...]
    equal_time_to: str | None = None
    waits: bool = False
    levels: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    variant: str
    seed: int
    folder: Path
    settings: Settings


@dataclass(frozen=True)
class Plan:
    """A study with everything settled, in `folder`. Differences are taken from the row named `baseline`."""

    title: str
    folder: Path
    baseline: str
    variants: tuple[Variant, ...]
    stages: tuple[Stage, ...] = ()

    def jobs(self) -> list[Job]:
        """The runs as they are trained: stage by stage, and in each every variant with one seed before the next."""
        seeds = list(dict.fromkeys(seed for variant in self.variants for seed in variant.seeds))
        found = [
            (stage, self.job(variant, seed))
            for seed in seeds
            for variant in self.variants
            for own, stage in zip(variant.seeds, variant.stages or [0] * len(variant.seeds), strict=True)
            if own == seed and not variant.waits
        ]
        return [job for _, job in sorted(found, key=lambda pair: pair[0])]

    def settled(self, best_of: Callable[[str], str | None]) -> Plan:
        """The plan with each variant's seeds by the stages, if there are any, and the epochs of rows that have begun.

        best_of: of a pattern's variants.
        """
        best = [{best_of(pattern) for pattern in stage.best} for stage in self.stages]
        variants = []
        for variant in self.variants:
            first: dict[int, int] = {}  # the stage of each seed
            for number, stage in enumerate(self.stages):
                named = any(fnmatchcase(variant.name, pattern) for pattern in stage.variants)
                if named or variant.name in best[number] or not (stage.variants or stage.best):
                    first = dict.fromkeys(range(stage.seeds), number) | first
            if self.stages:
                seeds = tuple(sorted(first))
                variant = replace(variant, seeds=seeds, stages=tuple(first[seed] for seed in seeds))
            variants.append(_with_known_epochs(variant, self.folder))
        return replace(self, variants=tuple(variants))

    def job(self, variant: Variant, seed: int) -> Job:
        """A variant's run with one seed."""
        folder = run_folder(self.folder, variant.name, seed)
        return Job(variant.name, seed, folder, replace(variant.settings, seed=seed, output=folder, resume="auto"))

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def only(self, names: Collection[str]) -> Plan:
        """The same study, of which only the variants of these names are trained; ValueError for an unknown one."""
        known = [variant.name for variant in self.variants]
        for name in names:
            if name not in known:
                raise ValueError(f"the study has no variant {name!r}: it has {', '.join(map(repr, known))}")
        return replace(self, variants=tuple(v for v in self.variants if v.name in names)) if names else self

    def write(self) -> None:
        """plan.json in the study's folder: settings, seeds, versions."""
        variants = [
            {
                "name": v.name,
                "levels": v.levels,
                "seeds": v.seeds,
                "equal_time_to": v.equal_time_to,
                "settings": v.settings.as_dict(),
            }
            for v in self.variants
        ]
        plan = {"title": self.title, "baseline": self.baseline, "variants": variants, "versions": runs.versions()}
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / PLAN, json.loads(json.dumps(plan, default=str)))


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return folder / f"{slug(name)}-s{seed}"


def common_settings(values: Mapping[str, Any], opened: Opener | None = None) -> Settings:
    """The settings that a file's [settings] mean, every `auto` resolved; `opened` opens the data for it."""
    return Settings.make(opened, **values)


def make_plan(document: Document, common: Settings, folder: Path, seeds: Sequence[int] | None = None) -> Plan:
    """The plan of a study: `common` settings changed by each variant; `seeds`, where given, replace the file's.

    Raises ValueError for an attention, a size or a value that can't be used, or folders that would be shared.
    """
    common = replace(resolve(common), resume=None, overwrite=False)
    chosen = tuple(document.seeds if seeds is None else seeds)
    variants = tuple(_variant(entry, common, chosen) for entry in document.entries)
    taken: dict[str, str] = {}
    for variant in variants:
        other = taken.setdefault(slug(variant.name), variant.name)
        if other != variant.name:
            raise ValueError(f"variants {other!r} and {variant.name!r} would share a folder: rename one")
    stages = document.stages if seeds is None else ()
    plan = Plan(document.title, folder, document.baseline, variants, stages)
    return plan if document.trials else plan.settled(lambda pattern: pattern)  # trials are the same ever after


def _variant(entry: VariantEntry, common: Settings, seeds: tuple[int, ...]) -> Variant:
    inner = {f.name for f in fields(Recipe)} | {renamed.OLD}
    own = {name: value for name, value in entry.values.items() if name not in inner}
    recipe = {name: value for name, value in entry.values.items() if name in inner}
    try:
        settings = replace(common, **own, recipe=common.recipe.override(**recipe))
        settings = contender(entry.attention, settings)
    except ValueError as error:
        raise ValueError(f"variant {entry.name!r}: {error}") from None
    if isinstance(entry.seeds, int):
        seeds = seeds[: entry.seeds]
    elif entry.seeds is not None:
        seeds = entry.seeds
    waits = entry.equal_time_to is not None and "epochs" not in entry.values
    return Variant(entry.name, settings, seeds, entry.equal_time_to, waits, entry.levels)


def _with_known_epochs(variant: Variant, folder: Path) -> Variant:
    """The epochs that the row's first run was given stay, whatever step times are measured later."""
    for seed in variant.seeds if variant.waits else ():
        path = run_folder(folder, variant.name, seed)
        if runs.is_run(path):
            saved, _ = runs.read_config(path)
            return with_epochs(variant, saved.recipe.epochs)
    return variant


def with_epochs(variant: Variant, epochs: int) -> Variant:
    """The variant trained for so many epochs, of which the warm-up takes the share that it took before."""
    recipe = variant.settings.recipe
    recipe = recipe.override(epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs)
    return replace(variant, settings=replace(variant.settings, recipe=recipe), waits=False)


def refuse_other_runs(plan: Plan) -> None:
    """Raise ValueError where the study's folder holds a run, finished or not, under other settings than asked for."""
    for job in plan.jobs():
        summary_of(job)


def summary_of(job: Job) -> dict[str, Any] | None:
    """A finished run's summary; None for one that isn't there or not finished.

    Raises ValueError for a run, finished or not, that has other settings than the study asks for.
    """
    if not runs.is_run(job.folder):
        return None
    saved, _ = runs.read_config(job.folder)
    change = first_change(saved, job.settings)
    if change is not None:
        raise ValueError(
            f"{job.folder} was trained under other settings: {change}; give another --output, rename the variant, "
            "or remove that folder"
        )
    path = job.folder / runs.SUMMARY
    summary = files.read_json(path) if path.is_file() else {}
    return summary if summary.get("finished") else None
