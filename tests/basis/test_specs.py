"""The grammar of specs: lists cut outside of brackets, names with options, values."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from karat.basis.specs import parse_call, read_option, split_list, split_spec


def test_commas_within_brackets_cut_nothing() -> None:
    parts = ["bspline(grid=10,order=3)-u", "softmax_heads=(0,2)", "blocks=[1,3]", "f(x=(1,(2,3)))", ""]
    assert split_list(" , ".join(parts)) == parts


def test_a_name_may_have_others_before_a_plus_sign() -> None:
    assert split_spec(" silu+morlet( omega = 1e+20 , ) ") == ("silu+morlet", ["omega = 1e+20"])
    assert split_spec("dog") == split_spec("dog()") == ("dog", [])
    assert [split_spec(text) for text in ("", "dog(", "(a=1)", "a b", "a+")] == [None] * 5


def test_options_have_known_keys_and_values_of_python() -> None:
    read = [read_option(f"a={text}", "a") for text in ("4", "04", "1e-3", "None", "(1,2)", "'x'", "word", "")]
    assert read == [("a", value) for value in (4, 4, 1e-3, None, (1, 2), "x", "word", "")]
    assert [read_option(text, ("a",)) for text in ("a", "b=1", "=1", "")] == [None] * 4


@pytest.mark.parametrize("spec", ["", "kan(5)", "kan(grid=", "kan(a=1 b=2)", "kan(a=f(b=1))", "silu+kan", "kan(**x)"])
def test_what_is_no_call_says_how_to_write_one(spec: str) -> None:
    with pytest.raises(ValueError, match=r"can.t read .* write a name with settings"):
        parse_call(spec)


@pytest.mark.parametrize("read", [split_spec, parse_call])
def test_a_setting_given_twice_is_refused(read: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="gives grid twice; give it once"):
        read("kan(grid=5,order=3, grid = 6)")
