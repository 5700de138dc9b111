"""Images and labels as they lie on disk or in memory, not yet decoded: what every `--data` turns into.

A source is a sequence of records (encoded image, label, name); the name is what an error message points
at. A stream is the same without random access. Neither knows anything of batches or augmentation.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Record(NamedTuple):
    """One sample: the encoded image (bytes, path, array, PIL image), its class, its name for messages."""

    image: Any
    label: int
    name: str


class Source(Protocol):
    """A sequence of records whose labels are known without opening an image."""

    labels: np.ndarray  # (n,) int64

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


class Stream(Protocol):
    """Records in an order of its own; `length` of them an epoch.

    classes: all names, `whose` they are, in the order of the labels that come out; None: a row's number is its label.
    """

    length: int
    classes: tuple[str, ...] | None
    whose: str

    def records(self, *, seed: int, rank: int, world_size: int) -> Iterator[tuple[int, Record]]:
        """(number, record) of this process's share; the numbers of all processes together are disjoint."""
        ...


def is_stream(source: Source | Stream) -> TypeIs[Stream]:
    """Whether the records come in an order of their own."""
    return hasattr(source, "records")


def size_of(source: Source | Stream) -> int:
    """How many records an epoch has."""
    return source.length if is_stream(source) else len(source)


@dataclass
class ArraySource:
    """Images already decoded: uint8 (n,H,W) or (n,H,W,3)."""

    images: np.ndarray
    labels: np.ndarray
    title: str

    def __post_init__(self) -> None:
        self.labels = np.asarray(self.labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]), f"{self.title}[{index}]")


class FileSource:
    """One image file a sample. The names are one numpy array of bytes: a million of them stay small."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths])
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        path = self.paths[index].decode("utf-8", "surrogateescape")
        return Record(path, int(self.labels[index]), path)


class SubsetSource:
    """Chosen samples of another source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices)
        self.labels = np.asarray(source.labels)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]._replace(label=int(self.labels[index]))


@dataclass(frozen=True)
class Splits:
    """What a `--data` was found to be: training and evaluation parts, classes, and what they look like."""

    train: Source | Stream
    eval: Source | Stream
    class_names: tuple[str, ...]
    in_chans: int = 3
    native_size: int | None = None  # the side that all images share, where they do
    mirror: bool = True  # False: a mirrored image may belong to another class (digits)
    found: str = ""  # what is used and what was left out, in a line, where that was looked for


def hold_out(source: Source, names: Sequence[str] | None = None, *, share: float = 0.1) -> tuple[Source, Source]:
    """Split one source into training and evaluation parts, `share` of every class (at least one image) held out.

    The choice depends on the names alone (None: the records' own; a folder's leave its path out, so that it can move):
    the same folder splits alike on every machine, and adding an image moves no other. A class of one image stays in
    training.
    """
    labels = np.asarray(source.labels)
    names = [source[i].name for i in range(len(source))] if names is None else names
    rank = np.array([_digest(name) for name in names], dtype=np.uint64)
    held = np.zeros(len(source), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held[members[np.argsort(rank[members], kind="stable")[:count]]] = True
    if not held.any():
        raise ValueError(
            f"{names[0]} and the other {len(source) - 1} images leave none to evaluate on: every class "
            "has one image; add images, or put some into a val/ subfolder"
        )
    return SubsetSource(source, np.flatnonzero(~held)), SubsetSource(source, np.flatnonzero(held))


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def take_fraction(source: Source | Stream, fraction: float) -> Source | Stream:
    """A fixed random subset with that fraction of the samples, at least one (a stream just ends earlier)."""
    chosen = fixed_part(size_of(source), fraction)
    if chosen is None:
        return source
    if is_stream(source):
        shorter = copy.copy(source)
        shorter.length = len(chosen)
        return shorter
    return SubsetSource(source, chosen)


def set_aside(source: Source | Stream, count: int) -> tuple[Source, Source]:
    """What is left, and a fixed random part of `count` samples. ValueError for a stream, or where nothing is left."""
    if is_stream(source):
        raise ValueError(f"held_out={count}: of a stream nothing can be held out; download the data first")
    if not 0 < count < len(source):
        raise ValueError(f"held_out={count} of {len(source)} training images: give 1 to {len(source) - 1}")
    order = np.random.default_rng(0).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, np.sort(order[:count]))


def fixed_part(count: int, fraction: float) -> np.ndarray | None:
    """The indices, ascending, of a fixed random part of `count` samples, one at least; None for all of them.

    Raises ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data fraction {fraction}: give a value in (0, 1]")
    if fraction == 1:
        return None
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])


def check_labels(source: Source | Stream, num_classes: int, where: str) -> None:
    """Raises ValueError for a label outside [0, num_classes). A stream's are checked as they come."""
    if is_stream(source):
        return
    labels = np.asarray(source.labels)
    for bad in np.flatnonzero((labels < 0) | (labels >= num_classes))[:1]:
        raise_label(int(labels[bad]), num_classes, f"{where} ({source[int(bad)].name})")


def raise_label(label: int, num_classes: int, where: str) -> None:
    """The ValueError for a label outside [0, num_classes)."""
    if label < 0:
        raise ValueError(f"{where} has label {label}: it is not labelled; choose another split or remove it")
    raise ValueError(
        f"{where} has label {label}, but num_classes is {num_classes}; "
        f"give --num-classes {label + 1} or more, or leave it out"
    )
