"""Means, deviations and differences against numpy and scipy; curves read between epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from karat.study.statistics import Mean, difference, read_curve

VALUES = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=6)


@given(VALUES)
def test_mean_and_sample_deviation(values: list[float]) -> None:
    found = Mean.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    if len(values) == 1:
        assert found.deviation is None
    else:
        assert found.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@given(VALUES, VALUES)
def test_a_difference_is_students_t_times_its_error(ours: list[float], theirs: list[float]) -> None:
    found = difference(Mean.of(ours), Mean.of(theirs))
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-9)
    freedom = len(ours) + len(theirs) - 2
    if freedom == 0:
        assert (found.standard_error, found.deviations) == (None, None)
        return
    apart = np.concatenate([np.subtract(ours, np.mean(ours)), np.subtract(theirs, np.mean(theirs))])
    pooled = np.sqrt(np.sum(apart**2) / freedom)
    assert found.standard_error == pytest.approx(pooled * np.sqrt(1 / len(ours) + 1 / len(theirs)), abs=1e-9)
    if pooled > 1e-3:
        assert found.deviations == pytest.approx(found.difference / pooled, rel=1e-6, abs=1e-6)
        if min(np.ptp(ours), np.ptp(theirs)) > 1e-3:  # scipy warns of equal values
            t = stats.ttest_ind(ours, theirs).statistic
            assert found.difference == pytest.approx(t * found.standard_error, rel=1e-6, abs=1e-6)


def test_equal_runs_have_no_deviation_to_count_in() -> None:
    assert difference(Mean.of([2.0, 2.0]), Mean.of([1.0, 1.0])).deviations is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 12))
def test_a_curve_is_read_as_numpy_does(curve: list[float], at: float) -> None:
    found = read_curve(curve, at)
    if at < 1:
        assert found is None
    else:
        assert found == pytest.approx(np.interp(at, np.arange(1, len(curve) + 1), curve), abs=1e-9)
