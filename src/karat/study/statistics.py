"""Means, deviations and differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its sample deviation (n - 1 in the denominator); None with one run."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Raises ValueError for no values.

        >>> Mean.of([1.0, 3.0]).deviation == 2**0.5
        True
        """
        if not values:
            raise ValueError("there is no mean of no values")
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Difference:
    """One mean minus another.

    standard_error: s √(1/n + 1/m), deviations: the difference over s, with s² = ((n-1) s_1² + (m-1) s_2²)/(n + m - 2),
    the pooled sample variance of single runs. Both are None where neither side has two runs, and where s = 0 the
    deviations are.
    """

    difference: float
    standard_error: float | None
    deviations: float | None


def difference(ours: Mean, theirs: Mean) -> Difference:
    """ours - theirs. A side with one run lends no deviation of its own: it is taken to scatter as the other does."""
    gap = ours.mean - theirs.mean
    freedom = ours.count + theirs.count - 2
    if freedom < 1:
        return Difference(gap, None, None)
    squares = sum((side.count - 1) * (side.deviation or 0.0) ** 2 for side in (ours, theirs))
    pooled = math.sqrt(squares / freedom)
    error = pooled * math.sqrt(1 / ours.count + 1 / theirs.count)
    return Difference(gap, error, gap / pooled if pooled > 0 else None)


def read_curve(curve: Sequence[float], at: float) -> float | None:
    """A curve of values after epochs 1, 2, ... read at a fraction of epochs, straight between them.

    None before the first epoch; the last value beyond the last one.

    >>> read_curve([40.0, 50.0], 1.5), read_curve([40.0, 50.0], 3), read_curve([40.0, 50.0], 0.5)
    (45.0, 50.0, None)
    """
    if at < 1 or not curve:
        return None
    before = min(int(at), len(curve)) - 1
    after = min(before + 1, len(curve) - 1)
    share = min(at - 1 - before, 1.0)
    return curve[before] + share * (curve[after] - curve[before])
