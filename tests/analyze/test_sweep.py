"""Runs that differ in one setting become curves over it."""

from __future__ import annotations

import pytest

from karat.analyze.sweep import settings_of, sweep


def test_settings_are_read_from_a_contenders_name() -> None:
    found = settings_of("bspline(grid=4,order=2)-u,rank=4/grkan")
    assert (found["basis"], found["grid"], found["bspline order"], found["order"]) == ("bspline", 4, 2, "WPhi")
    assert (found["rank"], found["sharing"], found["mlp"]) == (4, "universal", "grkan")
    assert settings_of("g1b/mimetic")["attn_init"] == "mimetic"


def test_seeds_are_averaged_and_values_ordered() -> None:
    found = sweep([("g5b", 60.0), ("g1b", 50.0), ("g1b", 54.0), ("softmax", 40.0), ("softmax", 42.0)])
    assert (found.setting, found.values) == ("grid", (1, 5))
    assert found.lines[""].mean == (52.0, 60.0)
    assert found.lines[""].deviation == (pytest.approx(8**0.5), None)
    assert found.reference == {"softmax": 41.0}


def test_other_settings_that_differ_give_lines_of_their_own() -> None:
    found = sweep([("g1b", 1.0), ("g3b", 2.0), ("g3u", 3.0), ("softmax/grkan", 4.0)], "grid")
    assert found.lines["sharing blockwise"].mean == (1.0, 2.0)
    assert found.lines["sharing universal"].mean == (None, 3.0)
    assert found.reference == {"softmax/grkan": 4.0}


def test_names_keep_their_order() -> None:
    assert sweep([("g3b,order=PhiW", 1.0), ("g3b", 2.0), ("g3b,order=PhiPhi", 3.0)]).values == (
        "PhiW",
        "WPhi",
        "PhiPhi",
    )
    assert sweep([("morlet-b", 1.0), ("dog-b", 2.0)], "basis").values == ("morlet", "dog")
    assert sweep([("silu+dog-b", 1.0), ("dog-b", 2.0)]).values == ("silu+dog", "dog")


def test_a_setting_that_does_not_differ_is_refused() -> None:
    with pytest.raises(ValueError, match="over 'rank' needs runs that differ in it; these differ in grid"):
        sweep([("g1b", 1.0), ("g3b", 2.0)], "rank")
    with pytest.raises(ValueError, match="these differ in nothing"):
        sweep([("g1b", 1.0), ("softmax", 2.0)])


def test_runs_of_another_model_are_no_seeds() -> None:
    named = [("g1b", 1.0), ("g1b", 5.0), ("g3b", 2.0), ("softmax", 4.0), ("softmax", 8.0)]
    found = sweep(named, beside=["", "model other", "", "", "model other"])
    assert found.lines[""].mean == (1.0, 2.0)
    assert found.lines["model other"].mean == (5.0, None)
    assert found.reference == {"softmax": 4.0, "softmax, model other": 8.0}
