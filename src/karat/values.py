"""What settings may be: annotations say type and range, and `check` holds every value against them.

Values come from a command line, a study's TOML or a config.json; all meet the same table here.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; those that `words` exclude are left out by `open_least`, `open_most`."""

    words: str
    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number lies within."""
        above = value > self.least if self.open_least else value >= self.least
        return bool(above and (value < self.most if self.open_most else value <= self.most))


@dataclass(frozen=True)
class OneOf:
    """A text of a list that isn't the annotation's own."""

    choices: tuple[str, ...]

    @property
    def words(self) -> str:
        """The choices."""
        return f"one of {', '.join(self.choices)}"

    def holds(self, value: Any) -> bool:
        """Whether it is one of them."""
        return value in self.choices


@dataclass(frozen=True)
class Growing:
    """Numbers in growing order."""

    words: str

    def holds(self, value: Any) -> bool:
        """Whether each is at least the one before."""
        return all(a <= b for a, b in pairwise(value))


@dataclass(frozen=True)
class Place:
    """Where something is to be written: a folder, or a file. What stands in the way is found before any work."""

    words: str
    folder: bool

    def holds(self, value: Path) -> bool:
        """Whether it is there as such, or can be made."""
        parents = value.parents if not self.folder else (value, *value.parents)
        there = next((one for one in parents if one.exists()), None)
        return (there is None or there.is_dir()) and (self.folder or not value.is_dir())


LARGEST = 2**31 - 1
Positive = Annotated[float, Range("give a positive value", 0, open_least=True)]
NotNegative = Annotated[float, Range("give 0 or more", 0)]
Probability = Annotated[float, Range("a probability lies in [0, 1]", 0, 1)]
Share = Annotated[float, Range("give a value in (0, 1]", 0, 1, open_least=True)]
Below1 = Annotated[float, Range("give a value in [0, 1)", 0, 1, open_most=True)]
Inner = Annotated[float, Range("give a value in (0, 1)", 0, 1, open_least=True, open_most=True)]
Strength = Annotated[float, Range("give a value in [0, 100]", 0, 100)]
Count = Annotated[int, Range("give 1 or more, below 2^31", 1, LARGEST)]
Natural = Annotated[int, Range("give 0 or more, below 2^31", 0, LARGEST)]
Processes = Annotated[int, Range("give 0 to 1024", 0, 1024)]
Seed = Annotated[int, Range("give a whole number from 0 to 2^63 - 1", 0, 2**63 - 1)]
Folder = Annotated[Path, Place("there is a file, and a folder is needed here", folder=True)]
File = Annotated[Path, Place("there is a folder, or a file in place of one, and a file is needed here", folder=False)]
Label = Annotated[str, "a text that may be anything: it is no path, and may be empty"]
Low2High = Growing("give (low, high), 0 < low <= high")


@cache
def hints(kind: Any) -> dict[str, Any]:
    """The annotation of each of a dataclass's fields, ranges included."""
    found = get_type_hints(kind, include_extras=True)
    return {f.name: found[f.name] for f in fields(kind)}


def check(options: Any) -> None:
    """Hold a dataclass's values against its annotations; lists that JSON made of tuples become tuples again.

    Raises ValueError naming the first value that can't be, with the remedy.
    """
    own: Any = type(options)
    for name, kind in hints(own).items():
        value = getattr(options, name)
        found = convert(name, value, kind)
        if found is not value:
            object.__setattr__(options, name, found)


def convert(name: str, value: Any, kind: Any) -> Any:
    """The value as a setting of the type `kind` takes it. Raises ValueError for one of another type or out of range.

    >>> convert("ratio", [0.5, 2], tuple[float, float])
    (0.5, 2)
    """
    found, complaint = _admit(value, kind)
    if complaint:
        shown = repr(str(value) if isinstance(value, Path) else value)
        raise ValueError(f"{name}={shown if len(shown) < 200 else shown[:200] + '…'}: {complaint}")
    return found


def _admit(value: Any, kind: Any) -> tuple[Any, str]:
    """The value as `kind` has it, and what is wrong with it, in words; nothing where it fits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        if kind == Label:
            return value, "" if isinstance(value, str) else "give a text"
        if is_typeddict(arguments[1]):
            return _admit_table(value, arguments[1])
        found, complaint = _admit(value, arguments[0])
        limits = [one for one in arguments[1:] if isinstance(one, Range | OneOf | Growing | Place)]
        broken = [] if complaint or found is None else [one.words for one in limits if not one.holds(found)]
        return found, complaint or ", ".join(broken)
    if origin in (Union, types.UnionType):
        tried = [_admit(value, one) for one in arguments]
        fits = next((pair for pair in tried if not pair[1]), None)
        if fits is not None:
            return fits
        right = [words for one, (_, words) in zip(arguments, tried, strict=True) if words != f"give {_words(one)}"]
        none = ["none"] if right and right[-1].startswith("give ") else []
        return value, " or ".join([*(right or [f"give {_words(kind)}"]), *none])
    if origin is Literal:
        return value, "" if value in arguments and type(value) in map(type, arguments) else f"give {_words(kind)}"
    if origin in (tuple, list):
        return _admit_several(value, kind)
    if is_typeddict(kind):
        return _admit_table(value, kind)
    if origin is dict and isinstance(value, dict):
        return value, next((words for one in value.values() if (words := _admit(one, arguments[1])[1])), "")
    if origin is not None:
        return value, "" if isinstance(value, origin) else f"give {_words(kind)}"
    if kind is Path and isinstance(value, str):
        value = Path(value)
    complaint = "" if _is(value, kind) else f"give {_words(kind)}"
    complaint = complaint or _TROUBLE.get(kind, lambda value: "")(value)
    return value if complaint or kind not in (str, Path) else kind(at_home(str(value))), complaint


def _admit_several(value: Any, kind: Any) -> tuple[Any, str]:
    origin, arguments = get_origin(kind), get_args(kind)
    if not isinstance(value, list | tuple):
        return value, f"give {_words(kind)}"
    kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        return value, f"give {len(kinds)} values"
    parts = [_admit(one, wanted) for one, wanted in zip(value, kinds, strict=True)]
    found = origin(part for part, _ in parts)
    return value if found == value else found, next((words for _, words in parts if words), "")


def _admit_table(value: Any, kind: Any) -> tuple[Any, str]:
    wanted = get_type_hints(kind, include_extras=True)
    if not isinstance(value, dict) or kind.__required_keys__ - value.keys():
        return value, f"give tables with {', '.join(wanted)}"
    given = (name for name in wanted if name in value)
    return value, next((f"{name}: {words}" for name in given if (words := _admit(value[name], wanted[name])[1])), "")


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _infinite(value: float) -> str:
    try:
        return "" if math.isfinite(value) else "give a finite number"
    except OverflowError:  # a whole number that no float holds
        return "give a smaller number"


def _unusable(value: str | Path) -> str:
    """What is wrong with a text, which may be a path."""
    if not str(value):
        return "give a text that isn't empty"
    if "\0" in str(value):
        return "it has a NUL character, which no name or path may have"
    if at_home(str(value)).startswith("~") and not os.path.exists(value):
        return f"{Path(value).parts[0]} is no user's home here"
    return ""


def local_path(text: str | Path) -> Path:
    """The path as it stands where something is there; else with ~ as the home folder, where there is such a user's."""
    path = Path(text)
    try:
        return path if os.path.exists(path) else path.expanduser()
    except RuntimeError:
        return path


def at_home(text: str) -> str:
    """A text that may be a path: with the home folder in ~'s place as `local_path` has it, else as it stands."""
    return str(local_path(text)) if text.startswith("~") else text


_TROUBLE: dict[Any, Callable[[Any], str]] = {float: _infinite, str: _unusable, Path: _unusable}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    dict: "a table",
}


def _words(kind: Any) -> str:
    """A type for people."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("none" if one is type(None) else _words(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return "a list of " + {str: "texts", Path: "paths"}.get(arguments[0], "values")
    return _NAMES.get(origin or kind, "the settings of " + getattr(kind, "__name__", str(kind)).lower())


def check_parsed(options: Any) -> None:
    """`check` for what a parser gave; it may be no dataclass."""
    if is_dataclass(options):
        check(options)
