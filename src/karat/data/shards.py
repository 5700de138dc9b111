"""`wds/SHARDS`: WebDataset's tar files, streamed from disk.

A sample is a run of members that share their path up to the first dot in its name: an image and a label, KEY.cls, or
where there is none KEY.txt or KEY.json. A label is text or a whole number; of JSON's fields the first of the usual
names is taken (`rows.LABEL_KEYS`).
"""

from __future__ import annotations

import io
import json
import operator
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from karat.data.files import find_shards
from karat.data.folder import is_image
from karat.data.images import reason_of
from karat.data.labels import MOST_NUMBERS, Column, name_of, positions
from karat.data.rows import LABEL_KEYS, RowStream
from karat.data.sources import Splits

LABELS = ("cls", "txt", "json")  # the parts of a sample that may say its class, the first that there is
NUMBER = re.compile(r"[+-]?\d+")


def open_shards(pattern: str, *, num_samples: int | None, whole: bool = False) -> Splits:
    """`wds/PATTERN`: WebDataset tar shards of KEY.jpg (or png, webp) and KEY.cls, streamed from disk.

    PATTERN is a folder with *train*.tar and *val*.tar (any name of the evaluation split), or two glob patterns
    "TRAIN::EVAL". Labels are read once before training; an `_info.json` beside shards of numbered classes (timm's)
    tells how many samples they hold and spares it. whole: as for `find_shards`. Raises ValueError naming the folder or
    shard that is missing or torn, or the sample that lacks its label.
    """
    import datasets

    shards = {split: list(map(str, paths)) for split, paths in find_shards(pattern, whole=whole).items()}
    kind = _kind_of_label(shards["train"][0])
    counts = {split: _noted(paths) for split, paths in shards.items()}
    first = next(_samples(shards["train"][:1], kind, images=False))["label"]
    classes: tuple[str, ...] | None = None
    if not all(counts.values()) or not _is_number(first):
        found = {
            split: [row["label"] for row in _samples(paths, kind, images=False)] for split, paths in shards.items()
        }
        counts = {split: len(names) for split, names in found.items()}
        known = tuple(dict.fromkeys(found["train"]))
        if kind == "txt" and 2 < len(known) == counts["train"]:
            raise ValueError(f"wds/{pattern}: each .txt says something else: captions, no classes; add .cls")
        classes = Column(known, np.zeros(0), numbered=all(map(_is_number, known))).classes
        positions(dict.fromkeys(found["eval"]), classes, f"wds/{pattern}:eval")
    if num_samples:
        counts["train"] = num_samples
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    streams = {
        split: RowStream(
            datasets.IterableDataset.from_generator(
                _samples, features=features, gen_kwargs={"paths": paths, "kind": kind, "images": True}
            ),
            f"wds/{pattern}:{split}",
            counts[split] or 0,
            split == "train",
            classes=classes,
        )
        for split, paths in shards.items()
    }
    return Splits(streams["train"], streams["eval"], classes or ())  # none: the caller's num_classes decides


def _is_number(name: str) -> bool:
    """Whether a class's name is the number of one: JSON's text may be "01", or an identifier of many digits."""
    return name.isascii() and name.isdecimal() and len(name) < 8 and str(int(name)) == name and int(name) < MOST_NUMBERS


def _noted(paths: list[str]) -> int | None:
    """How many samples the shards hold, where an `_info.json` beside them says it."""
    info = Path(paths[0]).parent / "_info.json"
    if not info.is_file():
        return None
    names = {Path(path).name for path in paths}
    try:
        for split in json.loads(info.read_text())["splits"].values():
            lengths = dict(zip(split["filenames"], split["shard_lengths"], strict=True))
            if names <= set(lengths):
                return sum(operator.index(lengths[name]) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{info} doesn't list splits with filenames and their shard_lengths; mend it, or remove it to have samples "
            "counted"
        ) from None
    return None


def _kind_of_label(path: str) -> str:
    """The part of a sample that says its class, by what there is in a shard."""
    there: set[str] = set()
    for _, members in islice(_grouped(path), 100):
        there |= set(members)
    for kind in LABELS:
        if kind in there:
            return kind
    found = ", ".join(sorted(f".{part}" for part in there)) or "nothing"
    raise ValueError(f"{path}: its samples have no label (.cls, .txt or .json), only {found}")


Member = tuple[tarfile.TarFile, tarfile.TarInfo]


def _grouped(path: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {part: member}) of each sample of a shard."""
    try:
        with tarfile.open(path) as shard:
            named = ((*_split_name(member.name), member) for member in shard if member.isfile())
            for key, group in groupby((item for item in named if item[1]), key=lambda item: item[0]):
                yield key, {part: (shard, member) for _, part, member in group}
            _check_end(shard)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable shard ({reason_of(error)}); fetch it again") from None


def _check_end(shard: tarfile.TarFile) -> None:
    """Raise ReadError where a shard that was read to its end has no mark there: tarfile takes a torn header for one."""
    if not isinstance(shard.fileobj, io.BufferedReader):  # compressed, which is checked as it is read
        return
    shard.fileobj.seek(shard.offset)
    if shard.fileobj.read(tarfile.BLOCKSIZE).strip(tarfile.NUL) or shard.fileobj.tell() == shard.offset:
        raise tarfile.ReadError("it has no end: cut short or damaged")


def _split_name(name: str) -> tuple[str, str]:
    """ "a.b/0001.seg.png" -> ("a.b/0001", "seg.png"); hidden files and those that begin with __ have no part."""
    folder, stroke, file = name.rpartition("/")
    base, _, part = file.partition(".")
    return f"{folder}{stroke}{base}", part.lower() if base and not file.startswith("__") else ""


def _samples(paths: list[str], kind: str, images: bool) -> Iterator[dict[str, Any]]:
    """The samples of shards as rows: the encoded image (without `images` none), and the name of the class."""
    for path in paths:
        for key, members in _grouped(path):
            where = f"{path}: sample {key}"
            if kind not in members:
                raise ValueError(f"{where} has no label (.{kind}); give it one or leave the sample out")
            picture = _picture(members, where)
            encoded = _read(members[picture]) if images and picture else b""
            image = {"path": f"{key}.{picture}" if picture else key, "bytes": encoded}
            yield {"image": image, "label": _class_of(kind, _read(members[kind]), where)}


def _picture(members: Iterable[str], where: str) -> str | None:
    """The part of a sample that is its image: KEY.png goes before KEY.depth.png. Raises ValueError for two alike."""
    parts = [part for part in members if is_image(f"{where}.{part}")]
    chosen = [part for part in parts if "." not in part] or parts
    if len(chosen) > 1:
        raise ValueError(f"{where} has several images (.{', .'.join(sorted(chosen))}); leave one in")
    return next(iter(chosen), None)


def _read(member: Member) -> bytes:
    shard, info = member
    content = shard.extractfile(info)
    assert content is not None, info.name
    return content.read()


def _class_of(kind: str, content: bytes, where: str) -> str:
    """The name of the class that a sample's part of this kind holds."""
    try:
        label: Any = content.decode("utf-8-sig").strip()
        if kind == "json":
            label = json.loads(label)
            if isinstance(label, dict):
                label = label[next(name for name in LABEL_KEYS if name in label)]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} has a .{kind} that cannot be read ({reason_of(error)})") from None
    except StopIteration:
        raise ValueError(f"{where} has a .json without {', '.join(LABEL_KEYS[:-1])} or {LABEL_KEYS[-1]}") from None
    if kind != "json" and NUMBER.fullmatch(label):
        label = int(label)
    return name_of(label, None, where)
