"""What a study's factors do, over all its cells together, with intervals, and what could have been seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy import optimize, stats

from karat.study.rows import VariantRow
from karat.study.table import grid

LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Effect:
    """One level of a factor minus another, in points of top-1, in the mean over the cells where both were run.

    within: the levels of other factors that these cells have; nothing: all cells. low, high: the interval of 95 %.
    least_seen: the smallest true difference that such runs would find with a power of 80 %. None where no two runs
    tell how far runs scatter.
    """

    factor: str
    level: str
    against: str
    difference: float
    low: float | None
    high: float | None
    least_seen: float | None
    cells: int
    within: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """top-1 = cell + seed + noise by least squares: runs of one seed are paired, whatever seeds a cell has.

    A cell is a row; places: of each among the parameters. covariance: of the parameters, in units of the variance.
    told: the projection on what the runs tell of the parameters.
    """

    means: np.ndarray
    covariance: np.ndarray
    deviation: float | None
    freedom: int
    places: Mapping[str, int]
    told: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[VariantRow]) -> Fit:
        """Of the finished runs."""
        runs = [(row.name, seed, curve[-1]) for row in rows for seed, curve in zip(row.seeds, row.curves, strict=True)]
        places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in runs))}
        seeds = list(dict.fromkeys(seed for _, seed, _ in runs))
        design = np.zeros((len(runs), len(places) + len(seeds) - 1))
        for line, (name, seed, _) in enumerate(runs):
            design[line, places[name]] = 1
            if seeds.index(seed):
                design[line, len(places) + seeds.index(seed) - 1] = 1
        values = np.array([value for _, _, value in runs])
        inverse = np.linalg.pinv(design.T @ design, hermitian=True)
        parameters = inverse @ design.T @ values
        freedom = len(runs) - int(np.linalg.matrix_rank(design))
        told = np.linalg.pinv(design) @ design
        squares = float(np.square(values - design @ parameters).sum())
        return cls(parameters, inverse, (squares / freedom) ** 0.5 if freedom else None, freedom, places, told)

    def difference(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, float | None, float | None]:
        """The mean of one cell minus another over pairs of cells, half its interval, and the least that is seen."""
        weights = np.zeros(len(self.means))
        for ours, theirs in pairs:
            weights[self.places[ours]] += 1 / len(pairs)
            weights[self.places[theirs]] -= 1 / len(pairs)
        found = float(weights @ self.means)
        if self.deviation is None:
            return found, None, None
        error = self.deviation * float(weights @ self.covariance @ weights) ** 0.5
        sure = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom))
        return found, sure * error, _shift(sure, self.freedom) * error

    def tells(self, ours: str, theirs: str) -> bool:
        """Whether runs with seeds in common, or of cells between, tell two cells apart."""
        weights = np.zeros(len(self.means))
        weights[self.places[ours]], weights[self.places[theirs]] = 1, -1
        return bool(np.allclose(self.told @ weights, weights, atol=1e-6))


def _shift(sure: float, freedom: int) -> float:
    """The true difference, in standard errors, whose t passes `sure` in either direction with a power of POWER."""
    most = 2 * (sure + float(stats.t.ppf(POWER, freedom)))  # a noncentral t needs at most a little over half of it
    return float(optimize.brentq(lambda m: stats.nct.sf(sure, freedom, m) - POWER, 0, most))


def effects(rows: Sequence[VariantRow]) -> list[Effect]:
    """Main effects of every factor, and of the first within each cell of the others; none for a study without factors.

    Every level is held against the factor's first, in the mean over the cells of the other factors where both have
    runs that tell them apart: with seeds in common, or by way of other cells.
    """
    done = [row for row in rows if row.levels and row.top1 is not None]
    if not done:
        return []
    fit, levels = Fit.of(done), _levels(rows)
    first, *others = levels
    asked: list[tuple[str, dict[str, str]]] = [(factor, {}) for factor in levels]
    if others:
        cells = product(*(levels[factor] for factor in others))
        asked += [(first, dict(zip(others, cell, strict=True))) for cell in cells]
    found = (
        _effect(fit, done, factor, level, levels[factor][0], within)
        for factor, within in asked
        for level in levels[factor][1:]
    )
    return [effect for effect in found if effect is not None]


def _levels(rows: Iterable[VariantRow]) -> dict[str, list[str]]:
    """The levels of each factor, in the order of the study."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for factor, level in row.levels.items():
            found.setdefault(factor, {})[level] = None
    return {factor: list(levels) for factor, levels in found.items()}


def _effect(
    fit: Fit, rows: Sequence[VariantRow], factor: str, level: str, against: str, within: Mapping[str, str]
) -> Effect | None:
    cells = {tuple(row.levels.items()): row.name for row in rows}
    pairs = []
    for row in rows:
        if row.levels[factor] == level and all(row.levels[name] == value for name, value in within.items()):
            other = cells.get(tuple((dict(row.levels) | {factor: against}).items()))
            if other is not None and fit.tells(row.name, other):
                pairs.append((row.name, other))
    if not pairs:
        return None
    found, half, least = fit.difference(pairs)
    low, high = (None, None) if half is None else (found - half, found + half)
    return Effect(factor, level, against, found, low, high, least, len(pairs), within)


def markdown(found: Sequence[Effect]) -> str:
    """The effects as Markdown."""
    lines = [["level − level", "within", "points", "95 %", "seen with 80 % power", "cells"]]
    for one in found:
        within = ", ".join(one.within.values()) or "all cells"
        interval = "–" if one.low is None else f"{one.low:+.2f} to {one.high:+.2f}"
        least = "–" if one.least_seen is None else f"{one.least_seen:.2f}"
        gap = f"{one.level} − {one.against}"
        lines.append([gap, within, f"{one.difference:+.2f}", interval, least, str(one.cells)])
    return grid(lines, texts=2)
