"""Hugging Face data: folders of parquet files, `hfds/NAME`, and streamed `hfids/NAME` and `wds/SHARDS`.

All through the `datasets` library. Images stay encoded until a loader asks for them, so a stream costs
the memory of its shuffle buffer and no more, and skipping ahead in it decodes nothing.
"""

from __future__ import annotations

import inspect
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from karat.data.files import eval_kind, find_files, find_shards, load_files
from karat.data.folder import Tree, local_path, part_of, said
from karat.data.images import reason_of
from karat.data.sources import Record, Splits, hold_out, size_of

SHUFFLE_BUFFER = 2048  # encoded images kept at a time; ImageNet's are 110 kB each on average
LABEL_KEYS = ("label", "labels", "fine_label", "cls", "target", "class")


class RowSource:
    """Rows of a `datasets.Dataset` (memory-mapped): one image column, one label column."""

    def __init__(self, dataset: Any, title: str) -> None:
        import datasets

        image, label = find_columns(dataset.features, title)
        feature = dataset.features[label]
        self.class_names: tuple[str, ...] | None = tuple(getattr(feature, "names", None) or ()) or None
        column = dataset.select_columns([label]).with_format("arrow")[:][label].to_numpy(zero_copy_only=False)
        if column.dtype == object:  # class names instead of numbers
            self.class_names = tuple(sorted({str(name) for name in column}))
            numbers = {name: number for number, name in enumerate(self.class_names)}
            column = np.array([numbers[str(name)] for name in column])
        self.labels = column.astype(np.int64)
        self.image_key = image
        self.dataset = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.title = title

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        value = self.dataset[index][self.image_key]
        return Record(*_encoded(value, int(self.labels[index]), f"{self.title}[{index}]"))


@dataclass
class RowStream:
    """`length` rows of a `datasets.IterableDataset`; for training shuffled by shards and by a buffer."""

    dataset: Any
    title: str
    length: int
    shuffle: bool

    def records(self, *, seed: int, rank: int, world_size: int) -> Iterator[tuple[int, Record]]:
        """(number, record) of this process: whole shards where they divide evenly, else every world_size-th row.

        A stream that isn't shuffled (evaluation) is always dealt out row by row, so that the shares'
        sizes are known beforehand.
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
        for count, row in enumerate(share):
            number = count * world_size + rank
            yield number, Record(*_encoded(row[image], int(row[label]), f"{self.title}[{number}]"))


def find_columns(features: Any, where: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises ValueError listing the columns when one is missing."""
    import datasets

    if features is None:
        raise ValueError(f"{where} does not say what its columns are; use hfds/ or a folder of parquet files")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    structs = [name for name in ("image", "img") if name in features and not images]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in LABEL_KEYS if name in features and name not in labels]
    for name in LABEL_KEYS:  # where there are several, the usual name goes first
        if name in labels:
            labels.insert(0, labels.pop(labels.index(name)))
            break
    if not (images or structs) or not labels:
        missing = "image" if labels else "label"
        raise ValueError(f"{where} has no {missing} column; its columns are {', '.join(features)}")
    return (images or structs)[0], labels[0]


def open_parquet(root: Path, tree: Tree | None = None, *, whole: bool = False, streaming: bool = False) -> Splits:
    """A folder of parquet files, sorted into splits by file or folder name (train*, val*, validation*, test*).

    Without an evaluation file a tenth of every class is held out; with `whole` all of the files are evaluated on then.
    Raises ValueError naming an unreadable file.
    """
    import datasets
    import pyarrow.parquet as pq

    kinds, left = find_files(root, ".parquet", tree)
    chosen = eval_kind(set(kinds.values()))
    if whole and chosen is None:
        kinds, chosen = dict.fromkeys(kinds, "val"), "val"
    files = {"train": [path for path, kind in kinds.items() if kind in ("train", "")]}
    files["eval"] = [path for path, kind in kinds.items() if kind == chosen]
    if not files["train"] and not (whole and files["eval"]):
        raise ValueError(f"{root}: no training files; name them train*.parquet, and test*.parquet for evaluation")
    left.folders += [path.name for path, kind in kinds.items() if path not in files["train"] + files["eval"]]
    parts: dict[str, Any] = {}
    counts = {"train": 0, "eval": 0}
    for split in [s for s in files if files[s]]:
        for path in files[split]:
            try:
                counts[split] += pq.read_metadata(path).num_rows
            except (OSError, ValueError) as error:  # pyarrow's errors derive from these
                raise ValueError(f"{path}: not a readable parquet file ({reason_of(error)}); fetch it again") from None
        if not counts[split]:
            raise ValueError(f"{files[split][0]}: has no rows")
        try:
            parts[split] = load_files("parquet", files[split], streaming=streaming)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{_culprit(pq, files[split])}: {reason_of(error.__cause__ or error)}") from None
    total = sum(counts.values())
    if not files["train"]:  # nobody trains
        parts["train"], counts["train"] = parts["eval"], counts["eval"]
    splits = _splits(parts, counts, str(root), streaming)
    shares = f"; trained on {size_of(splits.train):,}, evaluated on {size_of(splits.eval):,}"
    return replace(splits, found=said(total, splits.class_names, left) + shares)


def open_hub(
    name: str, *, streaming: bool, data_dir: Path | None, num_samples: int | None, whole: bool = False
) -> Splits:
    """`hfds/NAME` (downloaded once, memory-mapped) or `hfids/NAME` (streamed); NAME may be a folder of parquet.

    Raises ValueError saying what to do instead when the Hub can't be reached or has no such data set.
    """
    if local_path(name).is_dir():
        return open_parquet(local_path(name), whole=whole, streaming=streaming)
    import datasets

    kind = "hfids" if streaming else "hfds"
    try:
        loaded = datasets.load_dataset(name, streaming=streaming, cache_dir=str(data_dir) if data_dir else None)
    except Exception as error:  # the Hub's errors have no common base: offline, gated, renamed, not a data set
        raise ValueError(
            f"{kind}/{name} could not be loaded ({reason_of(error)}); check the name and the network, "
            "or place its parquet files in a folder and give that folder to --data"
        ) from error
    kinds = {part_of(name): name for name in sorted(loaded, reverse=True)}
    chosen = kinds.get(eval_kind(set(kinds)) or "none")
    train_name = kinds.get("train") or kinds.get("") or (chosen if whole else None)
    if train_name is None:
        raise ValueError(f"{kind}/{name} has no split to train on: {', '.join(loaded)}")
    parts = {"train": loaded[train_name]}
    if chosen:
        parts["eval"] = loaded[chosen]
    known = {
        part: (data.info.splits or {})[name].num_examples if name in (data.info.splits or {}) else 0
        for part, data, name in [(p, d, train_name if p == "train" else chosen) for p, d in parts.items()]
    }
    if num_samples:
        known["train"] = num_samples
    return _splits(parts, known, f"{kind}/{name}", streaming)


def open_shards(pattern: str, *, num_samples: int | None) -> Splits:
    """`wds/PATTERN`: WebDataset tar shards of KEY.jpg (or png, webp) and KEY.cls, streamed from disk.

    PATTERN is a folder with *train*.tar and *val*.tar (any name of the evaluation split), or two glob
    patterns "TRAIN::EVAL". An `_info.json` beside the shards (timm's) tells how many samples they hold;
    without it their headers are read once. Raises ValueError naming the folder or shard that is missing
    or torn.
    """
    shards = find_shards(pattern)
    counts, classes = {}, 0
    for split, paths in shards.items():
        counts[split], top = _count_shards(paths)
        classes = max(classes, top + 1)
    if num_samples:
        counts["train"] = num_samples
    parts = {split: load_files("webdataset", paths, streaming=True) for split, paths in shards.items()}
    return _splits(parts, counts, f"wds/{pattern}", True, classes)


def _count_shards(paths: list[Path]) -> tuple[int, int]:
    """How many samples the shards hold, and the largest label (-1 where `_info.json` spared the reading)."""
    info = paths[0].parent / "_info.json"
    if info.is_file():
        names = {path.name for path in paths}
        for split in json.loads(info.read_text())["splits"].values():
            lengths = dict(zip(split["filenames"], split["shard_lengths"], strict=True))
            if names <= set(lengths):
                return sum(lengths[name] for name in names), -1
    count, top = 0, -1
    for path in paths:
        try:
            with tarfile.open(path) as shard:
                for member in shard:
                    hidden = member.name.rpartition("/")[2].startswith((".", "__"))  # as datasets leaves them out
                    if member.name.endswith(".cls") and not hidden:
                        content = shard.extractfile(member)
                        assert content is not None, member.name
                        count, top = count + 1, max(top, int(content.read()))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable shard ({reason_of(error)}); fetch it again") from None
    return count, top


def _splits(parts: dict[str, Any], counts: dict[str, int], title: str, streaming: bool, num_classes: int = 0) -> Splits:
    """Splits from one or two opened parts; class names from the label column where it has them."""
    import datasets

    if not streaming:
        sources = [RowSource(part, f"{title}:{split}") for split, part in parts.items()]
        names = sources[0].class_names
        if names is None:
            names = tuple(str(i) for i in range(int(max(source.labels.max() for source in sources)) + 1))
        pair = sources if len(sources) == 2 else hold_out(sources[0], [str(i) for i in range(len(sources[0]))])
        return Splits(pair[0], pair[1], names)
    if "eval" not in parts:
        raise ValueError(f"{title} has no split to evaluate on (validation, test); hfds/ would hold a tenth out")
    _, label = find_columns(parts["train"].features, title)
    feature = parts["train"].features[label]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    else:  # unknown until the stream has been read: the caller's num_classes decides
        names = tuple(str(i) for i in range(num_classes))
    for split, part in parts.items():
        if not counts[split] and split == "eval":
            counts[split] = sum(1 for _ in part.select_columns([label]))
        if not counts[split]:
            raise ValueError(f"{title} does not say how many images it has; give --num-samples")
    streams = {s: RowStream(part, f"{title}:{s}", counts[s], s == "train") for s, part in parts.items()}
    return Splits(streams["train"], streams["eval"], names)


def _encoded(value: Any, label: int, name: str) -> tuple[Any, int, str]:
    """The encoded image in a row's image field, and the record's name with the file name where it has one."""
    if value is None:
        return b"", label, name
    path = value.get("path")
    return value.get("bytes") or path, label, f"{name} ({path})" if path else name


def _culprit(pq: Any, paths: list[Path]) -> str:
    """The first file that can't be read to its end."""
    for path in paths:
        try:
            for group in range((file := pq.ParquetFile(path)).num_row_groups):
                file.read_row_group(group)
        except (OSError, ValueError):
            return str(path)
    return ", ".join(map(str, paths))
