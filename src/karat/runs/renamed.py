"""An old name that still works: `coefficient_lr`, the operators' own rate, gave way to a factor of everybody's.

Runs were saved, studies written and commands noted down under it. Here it becomes `operator_lr_scale`: the ratio that
the optimiser worked out of it before, so that what was begun under the old name goes on bit-equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from karat.values import convert

OLD, NEW = "coefficient_lr", "operator_lr_scale"
_OLD_OPTION, _NEW_OPTION = "--coefficient-lr", "--operator-lr-scale"


def renamed(values: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """A recipe's values by the names of today; `lr` is the rate that the old one is a multiple of.

    Raises ValueError where both names are given.

    >>> renamed({"epochs": 3, "coefficient_lr": 1e-3}, lr=5e-4)
    {'epochs': 3, 'operator_lr_scale': 2.0}
    """
    found = dict(values)
    if OLD not in found:
        return found
    if NEW in found:
        raise ValueError(f"{OLD} is now {NEW}, and both are given: leave {OLD} out")
    rate, lr = (convert(name, value, float | None) for name, value in ((OLD, found.pop(OLD)), ("lr", lr)))
    return found | {NEW: 1.0 if rate is None or lr == 0 else rate / lr}  # an lr of 0 is the recipe's to refuse


def renamed_options(arguments: Sequence[str], lr: float) -> list[str]:
    """A command line by the names of today, with a printed line where that changes it; `lr` holds without an --lr.

    Raises ValueError for a rate that is no number.
    """
    old = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    old.add_argument(_OLD_OPTION, f"--{OLD}", dest="rate")
    known, rest = old.parse_known_args(list(arguments))
    if known.rate is None:
        return list(arguments)
    beside = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    beside.add_argument("--lr", default=lr)
    try:
        lr = float(beside.parse_known_args(rest)[0].lr)
        scale = 1.0 if known.rate == "None" else float(known.rate) / lr
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{_OLD_OPTION} {known.rate} can't be read as a multiple of lr: give {_NEW_OPTION}") from None
    print(f"note: {_OLD_OPTION} is now {_NEW_OPTION}: {known.rate} is {scale:g} of lr {lr:g}")
    return [*rest, _NEW_OPTION, repr(scale)]
