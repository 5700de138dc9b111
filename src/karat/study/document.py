"""A study's configuration file: TOML, with every name and every value checked before anything is trained."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, get_args

from karat.runs import renamed
from karat.runs.classification import Settings
from karat.runs.recipes import Recipe
from karat.values import Count, convert, hints

# What the study itself decides, run by run.
_OWN = frozenset({"attention", "seed", "resume", "overwrite", "preset", "recipe"})
# What must be the same in all rows of one table, or has no meaning in a row.
_COMMON_ONLY = frozenset({"recipe", "output", "data", "data_dir", "held_out", "device"})
_TOP = ("title", "seeds", "baseline", "settings", "variants", "factors", "trials", "stages")
_ROW = ("name", "attention", "seeds", "equal_time_to")
Value = Any


@dataclass(frozen=True)
class VariantEntry:
    """One variant as the file has it: `values` are the settings of this row only; seeds: None as the study's."""

    name: str
    attention: str
    values: Mapping[str, Value]
    seeds: tuple[int, ...] | int | None = None
    equal_time_to: str | None = None
    levels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trials:
    """How each variant's rate is chosen: of these, on so many held-out training images, with a seed of its own.

    together: factors whose levels share a rate, the better one in their mean. epochs: of each trial, its warm-up in
    proportion; None: as the runs that count.
    """

    lr: tuple[float, ...]
    held_out: int
    seed: int = 100
    together: tuple[str, ...] = ()
    epochs: int | None = None


@dataclass(frozen=True)
class Stage:
    """Runs that come before those of the next stage: seeds 0, 1, ... of the variants that the patterns name.

    best: of each of these patterns only the variant that did best in the trials.
    """

    seeds: int
    variants: tuple[str, ...] = ()
    best: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A study as its file has it; `settings` holds what is common, by the names of karat train's options."""

    title: str
    seeds: tuple[int, ...]
    baseline: str
    settings: Mapping[str, Value]
    entries: tuple[VariantEntry, ...]
    trials: Trials | None = None
    stages: tuple[Stage, ...] = ()


def read_document(path: Path) -> Document:
    """Read a study's file. Raises ValueError, naming the file and the entry, for one that can't be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        return parse_document(tomllib.loads(text), default_title=path.stem)
    except ValueError as error:  # TOMLDecodeError is one
        raise ValueError(f"{path}: {error}") from None


def parse_document(found: Mapping[str, Value], *, default_title: str = "study") -> Document:
    """A study from what TOML gives. Raises ValueError for a name or a value that is not known.

    >>> study = parse_document({"seeds": 2, "settings": {"epochs": 3}, "variants": [{"attention": "softmax"}]})
    >>> study.seeds, study.baseline
    ((0, 1), 'softmax')
    >>> parse_document({"variants": [{"attention": "softmax", "epoch": 3}]})
    Traceback (most recent call last):
    ...
    ValueError: variant 'softmax': unknown 'epoch': did you mean 'epochs'?
    """
    _known(found, _TOP, "the study")
    common = _table(found.get("settings", {}), "settings")
    names = setting_names()
    _known(common, [name for name in names if name not in _OWN - {"recipe"}], "settings")
    settings = {name: checked(name, value, names[name]) for name, value in common.items()}
    single = found.get("variants", [])
    if not isinstance(single, list) or not (single or "factors" in found):
        raise ValueError('there are no variants: add [[variants]] with an attention, e.g. attention = "softmax"')
    crossed = _crossed(_table(found["factors"], "factors")) if "factors" in found else ()
    listed: list[tuple[Value, dict[str, str]]] = [*((row, {}) for row in single), *crossed]
    entries = tuple(_entry(_table(row, "a variant"), names, levels) for row, levels in listed)
    trials, stages = _trials(found), _stages(found, [entry.name for entry in entries])
    for entry in entries:
        _refuse_undone(entry, trials, stages)
    title = _text(found.get("title", default_title), "title")
    baseline = _text(found.get("baseline", entries[0].name), "baseline")
    titles, seeds = [entry.name for entry in entries], seeds_of(found.get("seeds", 1))
    for name in titles:
        if titles.count(name) > 1:
            raise ValueError(f"variant {name!r} is named twice: give each a name of its own")
    _among(baseline, titles, "baseline")
    if trials is not None and renamed.OLD in settings:
        raise ValueError(f"settings: trials would change what {renamed.OLD} means: give {renamed.NEW} instead")
    for entry in entries:
        if renamed.OLD in settings and "lr" in entry.values and not {renamed.OLD, renamed.NEW} & set(entry.values):
            raise ValueError(
                f"variant {entry.name!r}: its lr would change what {renamed.OLD} means: give {renamed.NEW} instead"
            )
        if entry.equal_time_to is not None:
            _among(entry.equal_time_to, titles, f"variant {entry.name!r}: equal_time_to")
            if entry.equal_time_to == entry.name:
                raise ValueError(f"variant {entry.name!r}: equal_time_to names itself")
        if isinstance(entry.seeds, int) and entry.seeds > len(seeds):
            raise ValueError(
                f"variant {entry.name!r}: seeds={entry.seeds}, and the study has {len(seeds)}: give more, or a list"
            )
    return Document(title, seeds, baseline, settings, entries, trials, stages)


def _crossed(factors: Mapping[str, Value]) -> Iterator[tuple[dict[str, Value], dict[str, str]]]:
    """A variant for every combination of the factors' levels, named after them, with what each level sets."""
    tables = {name: _table(levels, f"factors.{name}") for name, levels in factors.items()}
    for name, levels in [("", tables), *tables.items()]:
        if not levels:
            raise ValueError(f"factors{name and '.'}{name} is empty: give it what is crossed, or leave it out")
    for combination in product(*tables.values()):
        levels = dict(zip(tables, combination, strict=True))
        row: dict[str, Value] = {"name": ", ".join(combination)}
        for factor, level in levels.items():
            added = _table(tables[factor][level], f"factors.{factor}.{level}")
            for name in added:
                if name == "name":
                    raise ValueError(f"factors.{factor}.{level}: variants are named after their levels: leave name out")
                if name in row:
                    raise ValueError(f"factors.{factor}.{level}: {name!r} is set by another factor too")
            row |= added
        yield row, levels


def _trials(found: Mapping[str, Value]) -> Trials | None:
    if "trials" not in found:
        return None
    table = _table(found["trials"], "trials")
    _known(table, ("lr", "held_out", "seed", "together", "epochs"), "trials")
    for name in ("lr", "held_out"):
        if name not in table:
            raise ValueError(f"trials has no {name}: give lr, the rates, and held_out, the number of images")
    kinds, rates = setting_names(), table["lr"]
    if not isinstance(rates, list) or not rates:
        raise ValueError(f"trials: lr={rates!r}: give a list of rates, [1e-3, 4e-3]")
    lr = tuple(checked("lr", rate, kinds["lr"], "trials") for rate in rates)
    if len({f"{rate:g}" for rate in lr}) < len(lr):
        raise ValueError(f"trials: lr={rates} names one rate twice, by the six digits that its runs are named after")
    factors = _texts(table["together"], "trials: together") if "together" in table else ()
    if factors and "factors" not in found:
        raise ValueError(f"trials: there is no factor {factors[0]!r}: the study has no factors")
    _known(factors, list(found.get("factors", {})), "trials", "there is no factor ")
    held_out = checked("held_out", table["held_out"], Count, "trials")
    epochs = checked("epochs", table["epochs"], kinds["epochs"], "trials") if "epochs" in table else None
    return Trials(lr, held_out, checked("seed", table.get("seed", 100), kinds["seed"], "trials"), factors, epochs)


def _stages(found: Mapping[str, Value], names: Sequence[str]) -> tuple[Stage, ...]:
    if "stages" not in found:
        return ()
    if not isinstance(found["stages"], list) or not found["stages"]:
        raise ValueError("stages must be tables, each begun by [[stages]], with seeds = NUMBER")
    if "seeds" in found:
        raise ValueError("stages say how many seeds there are: leave seeds out")
    stages = []
    for number, row in enumerate(found["stages"], start=1):
        where = f"stage {number}"
        table = _table(row, where)
        _known(table, ("seeds", "variants", "best"), where)
        if "seeds" not in table:
            raise ValueError(f"{where} has no seeds: give their number")
        seeds = checked("seeds", table["seeds"], Count, where)
        named = {name: _texts(table[name], f"{where}: {name}") for name in ("variants", "best") if name in table}
        for name, patterns in named.items():
            for pattern in patterns:
                if not any(fnmatchcase(known, pattern) for known in names):
                    raise ValueError(f"{where}: {name}: there is no variant {pattern!r}")
        if "best" in table and "trials" not in found:
            raise ValueError(f"{where}: best is told by trials, and there are none: add [trials]")
        stages.append(Stage(seeds, **named))
    return tuple(stages)


def _refuse_undone(entry: VariantEntry, trials: Trials | None, stages: Sequence[Stage]) -> None:
    """ValueError for what a variant sets and trials or stages would set again."""
    undone = {
        name: "trials choose the rate" for name in ("lr", renamed.OLD) if trials is not None and name in entry.values
    }
    if stages and entry.seeds is not None:
        undone["seeds"] = "stages say how many there are"
    for name, why in undone.items():
        raise ValueError(f"variant {entry.name!r}: {name}: {why}: leave it out")


def _entry(row: Mapping[str, Value], names: Mapping[str, Any], levels: Mapping[str, str]) -> VariantEntry:
    if "attention" not in row:
        raise ValueError(f'variant {row.get("name", dict(row))!r} has no attention, e.g. attention = "g3b"')
    attention = _text(row["attention"], "attention")
    name = _text(row.get("name", attention), "name")
    where = f"variant {name!r}"
    allowed = [setting for setting in names if setting not in _OWN | _COMMON_ONLY]
    for setting in row:
        if setting in _COMMON_ONLY:
            raise ValueError(f"{where}: {setting!r} is common to all rows: give it under [settings]")
    _known(row, [*_ROW, *allowed], where)
    values = {
        setting: checked(setting, value, names[setting], where) for setting, value in row.items() if setting not in _ROW
    }
    seeds = row.get("seeds")
    return VariantEntry(
        name=name,
        attention=attention,
        values=values,
        seeds=None if seeds is None else seeds if _whole(seeds) and seeds > 0 else seeds_of(seeds, where),
        equal_time_to=None if "equal_time_to" not in row else _text(row["equal_time_to"], f"{where}: equal_time_to"),
        levels=levels,
    )


def setting_names() -> dict[str, Any]:
    """Every name that a study's settings may have, with its type: karat train's options."""
    return hints(Settings) | hints(Recipe) | {"recipe": str, renamed.OLD: float | None}


def seeds_of(value: Value, where: str = "the study") -> tuple[int, ...]:
    """Seeds from a number, meaning 0, 1, ..., or a list of them. Raises ValueError for anything else."""
    if _whole(value) and value > 0:
        return tuple(range(value))
    if isinstance(value, list | tuple) and value and all(_whole(seed) and seed >= 0 for seed in value):
        if len(set(value)) < len(value):
            raise ValueError(f"{where}: seeds={list(value)} names one twice")
        return tuple(value)
    raise ValueError(f"{where}: seeds={value!r}: give a number of seeds, 1 or more, or a list such as [0, 1, 2]")


def checked(name: str, value: Value, kind: Any, where: str = "settings") -> Value:
    """A value as the setting of that type takes it; "none" stands for None, which TOML doesn't have.

    Raises ValueError for one of another type or out of range.
    """
    try:
        return convert(name, None if value == "none" and type(None) in get_args(kind) else value, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _whole(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Value, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}={value!r} is not a text")
    return value


def _texts(value: Value, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name}={value!r}: give a list of texts, or leave it out")
    if len(set(value)) < len(value):
        raise ValueError(f"{name}={value!r} names one twice")
    return tuple(value)


def _table(value: Value, name: str) -> Mapping[str, Value]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table of names and values, got {value!r}")
    return value


def _known(found: Collection[str], names: Collection[str], where: str, what: str = "unknown ") -> None:
    """ValueError for a name that isn't among `names`, with the nearest, or all of them where none is near."""
    for name in found:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
            raise ValueError(f"{where}: {what}{name!r}: {hint}")


def _among(name: str, names: Collection[str], where: str) -> None:
    _known([name], names, where, "there is no variant ")
