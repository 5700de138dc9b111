"""Rows of the `datasets` library as sources and streams: one image column, one label column."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from karat.data.labels import Column, name_of, positions, read_column
from karat.data.sources import Record
from karat.errors import brief

SHUFFLE_BUFFER = 2048  # encoded images kept at a time; ImageNet's are 110 kB each on average
LONGEST = 255  # characters of a path in a message: what is no path may be a whole file
IMAGE_KEYS = ("image", "img")
LABEL_KEYS = ("label", "labels", "fine_label", "cls", "target", "class")


class RowSource:
    """Rows of a `datasets.Dataset` (memory-mapped): its column of images, and labels that were read before."""

    def __init__(self, dataset: Any, image: str, labels: np.ndarray, title: str) -> None:
        import datasets

        self.labels, self.title, self.image_key = labels, title, image
        self.dataset = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        value = self.dataset[index][self.image_key]
        return Record(*_encoded(value, int(self.labels[index]), f"{self.title}[{index}]"))


@dataclass
class RowStream:
    """`length` rows of a `datasets.IterableDataset`; for training shuffled by shards and by a buffer.

    declared: the names that the rows' numbers stand for, where their file lists some. classes: all names in the order
    of the labels that come out; None where they aren't known, and a row's own number is its label.
    """

    dataset: Any
    title: str
    length: int
    shuffle: bool
    declared: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    whose: str = "training"

    def records(self, *, seed: int, rank: int, world_size: int) -> Iterator[tuple[int, Record]]:
        """(number, record) of this process: whole shards where they divide evenly, else every world_size-th row.

        A stream that isn't shuffled (evaluation) is always dealt out row by row, so that the shares'
        sizes are known beforehand. Raises ValueError for a row whose label is none of the classes.
        """
        import datasets

        image, label = find_columns(self.dataset.features, self.title)
        rows = self.dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        by_shards = self.shuffle and world_size > 1 and rows.num_shards % world_size == 0
        if self.shuffle:
            options: dict[str, Any] = {"seed": seed % 2**32, "buffer_size": SHUFFLE_BUFFER}
            if "max_buffer_input_shards" in inspect.signature(rows.shuffle).parameters:
                options["max_buffer_input_shards"] = 1  # the default interleaves shards, row by row and slowly
            rows = rows.shuffle(**options)
        if by_shards:
            from datasets.distributed import split_dataset_by_node

            share: Any = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        else:
            share = islice(rows, rank, None, world_size)
        places: dict[str, int] = {}
        for count, row in enumerate(share):
            number = count * world_size + rank
            where = f"{self.title}[{number}]"
            name = name_of(row[label], self.declared, where)
            if name not in places:
                places[name] = self._place(name, where)
            yield number, Record(*_encoded(row[image], places[name], where))

    def _place(self, name: str, where: str) -> int:
        if self.classes is not None:
            return int(positions([name], self.classes, where, self.whose)[0])
        if not name.isdecimal():
            raise ValueError(f"{where} has the label {name!r}, and the classes of this stream are numbers")
        return int(name)


def find_columns(features: Any, where: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises ValueError listing the columns when one is missing."""
    import datasets

    if features is None:
        raise ValueError(f"{where} does not say what its columns are; use hfds/ or a folder of parquet files")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name in IMAGE_KEYS if name in features]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in LABEL_KEYS if name in features]
    if not images or not labels:
        missing = "image" if labels else "label"
        raise ValueError(f"{where} has no {missing} column; its columns are {', '.join(features)}")
    # where there are several, the usual name goes first
    image, label = (
        next((key for key in usual if key in found), found[0])
        for usual, found in ((IMAGE_KEYS, images), (LABEL_KEYS, labels))
    )
    for name in (image, label):
        kind = features.arrow_schema.field(name).type
        if str(kind).endswith("_view"):
            raise ValueError(f"{where}: its column {name!r} is a {kind}, which datasets can't read; write it without")
        if name == image and not _holds_images(kind):
            raise ValueError(
                f"{where}: its column {image!r} holds {brief(str(kind))}, no images; give each file's bytes or path, "
                "or a record of both"
            )
    return image, label


def _holds_images(kind: Any) -> bool:
    """Whether a column of this arrow type may hold files by bytes or path; `datasets` makes other numbers of pixels."""
    import pyarrow as pa

    kind = getattr(kind, "storage_type", kind)
    if not pa.types.is_struct(kind):
        return _is_file(kind)
    held = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
    return _is_file(held.get("bytes")) or _is_file(held.get("path"))


def _is_file(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "string", "large_string")


def column_of(dataset: Any, label: str, title: str) -> Column:
    """The labels of a `datasets.Dataset`."""
    column = dataset.select_columns([label]).with_format("arrow")[:][label]
    return read_column(column, names_in(dataset.features[label]), lambda row: f"{title}[{row}]")


def names_in(feature: Any) -> tuple[str, ...] | None:
    """The names that a label column declares; None where it declares none."""
    return tuple(getattr(feature, "names", None) or ()) or None


def _encoded(value: Any, label: int, name: str) -> tuple[Any, int, str]:
    """The encoded image in a row's image field, and the record's name with the file name where it has one."""
    found, path = (None, None) if value is None else (value.get("bytes"), value.get("path"))
    image = path if found is None else found
    return b"" if image is None else image, label, f"{name} ({path[:LONGEST]})" if path else name
