"""Which class is which: a label is a class by its name, wherever names exist, and every part of karat asks here.

What lies in a file stands for a class thus: text is its name; a whole number is the place of a name that the file
declares, or the name itself where the file declares none. Two sets of classes are brought together by names alone,
compared letter by letter. What stands for no class, or for one that the other side lacks, is refused.
"""

from __future__ import annotations

import copy
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from karat.data.sources import Source, Stream, SubsetSource, is_stream
from karat.errors import brief

MOST_NUMBERS = 2**20  # a larger number is an identifier of something, and a head of so many classes fits nowhere
SHOWN = 8  # names in a message


class Column(NamedTuple):
    """The labels of rows: `codes` (n,) are places in `names`.

    declared: the classes that the rows' file lists, in its order; None where it lists none.
    numbered: the labels were numbers without declared names, so that their names are those numbers.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    declared: tuple[str, ...] | None = None
    numbered: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class: the declared ones, others in the order of the alphabet behind them; numbers from 0 on."""
        if self.numbered:
            return tuple(map(str, range(max((int(name) + 1 for name in self.names), default=0))))
        declared = self.declared or ()
        return (*declared, *sorted(set(self.names) - set(declared)))


def name_of(label: Any, declared: Sequence[str] | None, where: str) -> str:
    """The name of the class that a label, as a file holds it, stands for.

    Raises ValueError for one that is missing, negative, a fraction, a list, beyond the declared names, or anything
    else that names no class.
    """
    if isinstance(label, bytes):
        try:
            label = label.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where} has a label of bytes that are no text; give its class's name") from None
    if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
        raise ValueError(f"{where} has no label; give it one or leave it out of the data")
    if isinstance(label, str | bool):
        return str(label)
    if not isinstance(label, int | float) or not math.isfinite(label) or label != int(label):
        raise ValueError(f"{where} has the label {brief(label)}, which names no class; give text or a whole number")
    number = int(label)
    if number < 0:
        raise ValueError(f"{where} has label {number}: it is not labelled; choose another split or remove it")
    if declared is None:
        if number >= MOST_NUMBERS:
            raise ValueError(f"{where} has label {number}: a class's number is below {MOST_NUMBERS}; give its name")
        return str(number)
    if number >= len(declared):
        raise ValueError(f"{where} has label {number}, but its file names {len(declared)} classes ({some(declared)})")
    return declared[number]


def read_column(column: Any, declared: Sequence[str] | None, where: Callable[[int], str]) -> Column:
    """The labels of one of arrow's columns, each as `name_of` says; `where` names a row in its errors."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):  # pandas' categories
        column = column.cast(column.type.value_type)
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    try:
        values = pc.unique(column)
        codes = pc.index_in(column, value_set=values).to_numpy().astype(np.int64)
    except pa.ArrowNotImplementedError:  # lists, records
        first = next(iter(column.slice(0, 1).to_pylist()), column.type)
        raise ValueError(
            f"{where(0)} has the label {brief(first)}: an image has one class here; give one name or number"
        ) from None
    rows = np.unique(codes, return_index=True)[1]  # where each value comes first
    named = [name_of(value, declared, where(int(row))) for value, row in zip(values.to_pylist(), rows, strict=True)]
    names = tuple(dict.fromkeys(named))  # 0.0 and -0.0 are one class
    numbered = declared is None and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type))
    codes = np.array([names.index(name) for name in named], dtype=np.int64)[codes]
    return Column(names, codes, None if declared is None else tuple(declared), numbered)


def join(columns: Sequence[Column], where: Sequence[str]) -> Column:
    """The labels of several files, called as `where` says, one after the other; each by its own file's names.

    Raises ValueError where some files number their classes and others name them.
    """
    numbered = [place for column, place in zip(columns, where, strict=True) if column.numbered]
    named = [place for column, place in zip(columns, where, strict=True) if not column.numbered]
    if numbered and named:
        raise ValueError(f"{numbered[0]} numbers its classes and {named[0]} names them; name them in both")
    names = tuple(dict.fromkeys(name for column in columns for name in column.names))
    codes = [positions(column.names, names, place)[column.codes] for column, place in zip(columns, where, strict=True)]
    lists = [column.declared for column in columns if column.declared is not None]
    declared = tuple(dict.fromkeys(name for names in lists for name in names)) if lists else None
    return Column(names, np.concatenate(codes), declared, bool(numbered))


def positions(names: Iterable[str], classes: Sequence[str], where: str, whose: str = "training") -> np.ndarray:
    """The place among `classes` of each of the names that occur in `where`: (len(names),) int64.

    Raises ValueError naming one that the classes lack, or that two of them have. whose: what has the classes.
    """
    names = list(names)
    if names == list(classes):  # nothing to look up, even where two classes are called alike
        return np.arange(len(names))
    places = {name: place for place, name in enumerate(classes)}
    for name in names:
        if name not in places:
            raise ValueError(
                f"{where} has the class {name!r}, which {whose} lacks ({some(classes)}){_nearly(name, classes)}; "
                "add it there or remove it here"
            )
        if len(places) < len(classes) and list(classes).count(name) > 1:
            raise ValueError(f"{where} has the class {name!r}, and {whose} has two of that name; rename one")
    return np.array([places[name] for name in names], dtype=np.int64)


def relabel(
    part: Source | Stream, names: Sequence[str], classes: Sequence[str], where: str, whose: str
) -> Source | Stream:
    """A source or stream whose labels are places among `classes` instead of `names`; only the names that occur count.

    Raises ValueError as `positions`, of a stream when the row comes.
    """
    if is_stream(part):
        changed = copy.copy(part)
        changed.classes, changed.whose = tuple(classes), whose
        return changed
    if list(names) == list(classes):
        return part
    used, codes = np.unique(part.labels, return_inverse=True)
    found = SubsetSource(part, np.arange(len(part)))
    found.labels = positions([names[label] for label in used], classes, where, whose)[codes]
    return found


def check_unchanged(before: Iterable[str], now: Iterable[str], where: object) -> None:
    """Raise ValueError, saying which, where the classes of a run's data are no longer those that it began with."""
    before, now = list(map(str, before)), list(map(str, now))
    if before == now:
        return
    gone, new = ([name for name in some if name not in set(others)] for some, others in ((before, now), (now, before)))
    parts = [f"{some(gone)} gone"] if gone else []
    parts += [f"{some(new)} new{_nearly(new[0], before)}"] if new else []
    if not parts:
        moved = [name for name, other in zip(now, before, strict=False) if name != other]
        parts = [f"{some(moved)} in another order" if moved else "another number of them"]
    raise ValueError(
        f"{where} can't go on: the data's classes have changed ({', '.join(parts)}); give it back its classes "
        f"({some(before)}) or begin a new run"
    )


def _nearly(name: str, classes: Iterable[str]) -> str:
    """A word on a class whose name differs in case, spaces or Unicode form only, if there is one."""
    same = next((other for other in classes if other != name and _plain(other) == _plain(name)), None)
    return "" if same is None else f"; {same!a} is written otherwise than {name!a}"


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def some(names: Sequence[str]) -> str:
    """Names in a line, the first of them where there are many."""
    more = f", … {len(names)} in all" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more
