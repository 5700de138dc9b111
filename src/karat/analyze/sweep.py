"""Runs that differ in one setting of the operator, as curves: G, R, order, basis, sharing, ..."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from karat.basis.specs import parse_call
from karat.models.starts import STARTS
from karat.operator.config import KArAtConfig


@dataclass(frozen=True)
class Line:
    """Top-1 at each value of the setting, over its seeds; None where no run has it, or one seed has no deviation."""

    mean: tuple[float | None, ...]
    deviation: tuple[float | None, ...]


@dataclass(frozen=True)
class Sweep:
    """What the runs differ in, the values it takes, one line for each combination of the other settings.

    `reference` holds what the setting doesn't apply to: softmax.
    """

    setting: str
    values: tuple[Any, ...]
    lines: dict[str, Line]
    reference: dict[str, float]


def settings_of(attention: str) -> dict[str, Any]:
    """A contender's settings as a flat table: the basis's own options (grid, order, ...) beside the operator's.

    >>> settings_of("g5u,rank=4")["grid"], settings_of("g5u,rank=4")["sharing"]
    (5, 'universal')
    """
    attention, *beside = attention.split("/")
    config = KArAtConfig.parse(attention)
    flat = dataclasses.asdict(config) | {"attn_init" if name in STARTS else "mlp": name for name in beside}
    if config.is_softmax:
        return flat
    flat["basis"] = config.basis.partition("(")[0]
    family, options = parse_call(config.basis.rpartition("+")[2])
    return flat | {f"{family} {name}" if name in flat else name: value for name, value in options.items()}


def sweep(results: Sequence[tuple[str, float]], setting: str | None = None, beside: Sequence[str] = ()) -> Sweep:
    """Curves from (contender, top-1) of any number of runs; contenders as in `karat compare`: "g3b", "g3b/grkan".

    `setting` is the one to draw along, such as "grid", "rank", "order", "basis" or "sharing"; None takes the one
    with the most values. `beside`, a text for each run, tells apart what else runs differ in: it gives lines of their
    own.

    Raises ValueError where no setting differs, or the named one doesn't.
    """
    learned: list[tuple[dict[str, Any], str, float]] = []
    fixed: dict[str, list[float]] = {}
    for (name, top1), more in zip(results, beside or [""] * len(results), strict=True):
        if _is_softmax(name):
            fixed.setdefault(", ".join(filter(None, (name, more))), []).append(top1)
        else:
            learned.append((settings_of(name), more, top1))
    names = dict.fromkeys(name for settings, *_ in learned for name in settings)
    taken = {name: {repr(settings.get(name)) for settings, *_ in learned} for name in names}
    varied = {name: len(values) for name, values in taken.items() if len(values) > 1}
    if setting is None and varied:
        setting = max(varied, key=lambda name: varied[name])
    if setting is None or setting not in varied:
        differing = ", ".join(varied) or "nothing"
        asked = "a sweep" if setting is None else f"a sweep over {setting!r}"
        raise ValueError(f"{asked} needs runs that differ in it; these differ in {differing}")
    learned = [one for one in learned if setting in one[0]]
    values = _ordered([settings[setting] for settings, *_ in learned])
    others = [name for name in varied if name != setting]
    groups: dict[str, dict[str, list[float]]] = {}
    for settings, more, top1 in learned:
        group = ", ".join([f"{name} {settings[name]}" for name in others if name in settings] + [more] * bool(more))
        groups.setdefault(group, {}).setdefault(repr(settings[setting]), []).append(top1)
    lines = {}
    for group, found in groups.items():
        seeds = [found.get(repr(value), []) for value in values]
        lines[group] = Line(
            mean=tuple(statistics.fmean(s) if s else None for s in seeds),
            deviation=tuple(statistics.stdev(s) if len(s) > 1 else None for s in seeds),
        )
    return Sweep(setting, tuple(values), lines, {name: statistics.fmean(found) for name, found in fixed.items()})


def _is_softmax(contender: str) -> bool:
    return contender.partition("/")[0].partition(",")[0] == "softmax"


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once, numbers first and ascending."""
    unique = {repr(value): value for value in values}.values()
    return sorted(unique, key=lambda value: (0, value) if isinstance(value, int | float) else (1, 0))
