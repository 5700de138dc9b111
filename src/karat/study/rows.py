"""The rows of a study's table, from its finished runs and what was measured of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from karat import runs
from karat.study.compare import count_operations
from karat.study.plan import Job, Plan, Variant, summary_of
from karat.study.statistics import Difference, Mean, difference, read_curve
from karat.study.timing import Times, time_ratio


@dataclass(frozen=True)
class AtEqualTime:
    """A row beside one that was trained for the same time: `against` its name, and ours minus its top-1."""

    against: str
    top1: Mean
    difference: Difference


@dataclass(frozen=True)
class VariantRow:
    """A variant's results over its finished runs; without any, those that need one are None.

    top1: %, after the last epoch. curve: mean top-1 after each epoch; curves: of each run. difference: to the
    baseline; None for that itself. time_ratio: the time that the row's epochs take, over that of the row which it is
    declared `equal_time_to`. at_equal_time: rows declared so of this one. in_baseline_time: the curve read where the
    baseline's whole training time has passed. step: seconds of a training step by precision. measures: what was
    measured of the trained models. planned: how many runs the study asks for. levels: of the study's factors. lr: its
    runs' rate.
    """

    name: str
    attention: str
    epochs: int
    seeds: tuple[int, ...]
    planned: int
    amp_dtype: str
    top1: Mean | None = None
    curve: tuple[float, ...] = ()
    curves: tuple[tuple[float, ...], ...] = ()
    difference: Difference | None = None
    equal_time_to: str | None = None
    time_ratio: float | None = None
    at_equal_time: tuple[AtEqualTime, ...] = ()
    in_baseline_time: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    step: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, Mean] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    levels: Mapping[str, str] = field(default_factory=dict)
    lr: float | None = None

    @property
    def own_step(self) -> float | None:
        """Seconds of a step in the precision that the runs were trained in."""
        return self.step.get(self.amp_dtype)


@dataclass(frozen=True)
class _Found:
    """A variant with its finished runs."""

    variant: Variant
    jobs: list[Job]
    summaries: list[dict[str, Any]]
    histories: list[list[dict[str, Any]]]

    @property
    def top1(self) -> Mean | None:
        return Mean.of([summary["top1"] for summary in self.summaries]) if self.summaries else None

    @property
    def curves(self) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(line["top1"] for line in history) for history in self.histories)

    @property
    def updates(self) -> float | None:
        """Training steps an epoch."""
        return self.histories[0][-1]["step"] / self.histories[0][-1]["epoch"] if self.histories else None


def make_rows(plan: Plan, times: Times, measured: Mapping[str, Mapping[str, float | None]]) -> list[VariantRow]:
    """One row a variant, in the study's order. `measured`: numbers by run folder's name."""
    found = {variant.name: _find(plan, variant) for variant in plan.variants}
    return [_row(plan, variant, found, times, measured) for variant in plan.variants]


def _find(plan: Plan, variant: Variant) -> _Found:
    jobs = [] if variant.waits else [plan.job(variant, seed) for seed in variant.seeds]
    pairs = [(job, summary) for job in jobs if (summary := summary_of(job)) is not None]
    done = [job for job, _ in pairs]
    histories = [runs.read_history(job.folder) for job in done]
    return _Found(variant, done, [summary for _, summary in pairs], histories)


def _row(
    plan: Plan,
    variant: Variant,
    found: Mapping[str, _Found],
    times: Times,
    measured: Mapping[str, Mapping[str, float | None]],
) -> VariantRow:
    mine, baseline = found[variant.name], found[plan.baseline]
    equal = None if variant.equal_time_to is None or variant.waits else plan.variant(variant.equal_time_to)
    row = VariantRow(
        name=variant.name,
        attention=variant.settings.label,
        epochs=variant.settings.recipe.epochs,
        seeds=tuple(job.seed for job in mine.jobs),
        planned=len(variant.seeds),
        amp_dtype=variant.settings.amp_dtype,
        equal_time_to=variant.equal_time_to,
        time_ratio=None if equal is None else time_ratio(variant, equal, times),
        step=times.get(variant.name, {}),
        levels=variant.levels,
        lr=variant.settings.recipe.lr if variant.seeds else None,
    )
    top1 = mine.top1
    if top1 is None:
        return row
    curve = tuple(statistics.fmean(values) for values in zip(*mine.curves, strict=True))
    _, facts = runs.read_config(mine.jobs[0].folder)
    return replace(
        row,
        top1=top1,
        curve=curve,
        curves=mine.curves,
        difference=None if baseline.top1 is None or variant.name == plan.baseline else difference(top1, baseline.top1),
        at_equal_time=tuple(
            AtEqualTime(one.variant.name, one.top1, difference(top1, one.top1))
            for one in found.values()
            if one.variant.equal_time_to == variant.name and one.top1 is not None
        ),
        in_baseline_time=_in_baseline_time(mine, baseline, curve, times),
        parameters=mine.summaries[0]["parameters"],
        multiply_adds=count_operations(variant.settings, int(facts["num_classes"]), int(facts["in_chans"])),
        measures=_means([measured.get(job.folder.name, {}) for job in mine.jobs]),
        runs=tuple(str(job.folder) for job in mine.jobs),
    )


def _in_baseline_time(mine: _Found, baseline: _Found, curve: Sequence[float], times: Times) -> float | None:
    """The mean curve where this row has trained as long as the baseline did in all, by measured step times."""
    ours = times.get(mine.variant.name, {}).get(mine.variant.settings.amp_dtype)
    theirs = times.get(baseline.variant.name, {}).get(baseline.variant.settings.amp_dtype)
    if ours is None or theirs is None or mine.updates is None or baseline.updates is None:
        return None
    budget = baseline.variant.settings.recipe.epochs * baseline.updates * theirs
    return read_curve(curve, budget / (mine.updates * ours))


def _means(found: Sequence[Mapping[str, float | None]]) -> dict[str, Mean]:
    """The mean of each number over the runs that have it."""
    names = dict.fromkeys(name for numbers in found for name in numbers)
    values = {name: [v for numbers in found if (v := numbers.get(name)) is not None] for name in names}
    return {name: Mean.of(list(map(float, known))) for name, known in values.items() if known}
