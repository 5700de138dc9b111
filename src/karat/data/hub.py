"""Hugging Face data: folders of parquet files, `hfds/NAME`, and streamed `hfids/NAME`.

All through the `datasets` library. Images stay encoded until a loader asks for them, so a stream costs
the memory of its shuffle buffer and no more, and skipping ahead in it decodes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from karat.data.files import eval_kind, find_files, load_files
from karat.data.folder import PARQUET, Tree, part_of, said
from karat.data.images import reason_of
from karat.data.labels import Column, join, positions, read_column
from karat.data.rows import RowSource, RowStream, column_of, find_columns, names_in
from karat.data.sources import Splits, hold_out, size_of
from karat.values import local_path

SAVED = ("dataset_dict.json", "state.json")  # one of them lies in a folder that `save_to_disk` wrote


def open_parquet(root: Path, tree: Tree | None = None, *, whole: bool = False, streaming: bool = False) -> Splits:
    """A folder of parquet files, sorted into splits by file or folder name (train*, val*, validation*, test*).

    Without an evaluation file a tenth of every class is held out; with `whole` all of the files are evaluated on then.
    Raises ValueError naming an unreadable file.
    """
    import datasets
    import pyarrow.parquet as pq

    kinds, left = find_files(root, PARQUET, tree)
    chosen = eval_kind(set(kinds.values()))
    if whole and chosen is None:
        kinds, chosen = dict.fromkeys(kinds, "val"), "val"
    files = {"train": [path for path, kind in kinds.items() if kind in ("train", "")]}
    files["eval"] = [path for path, kind in kinds.items() if kind == chosen]
    if not files["train"] and not (whole and files["eval"]):
        raise ValueError(f"{root}: no training files; name them train*.parquet, and test*.parquet for evaluation")
    if whole:  # nobody trains, and the evaluated part says its classes itself
        files["train"] = []
    left.folders += [path.name for path, kind in kinds.items() if path not in files["train"] + files["eval"]]
    parts: dict[str, Part] = {}
    counts = {"train": 0, "eval": 0}
    for split in [s for s in files if files[s]]:
        rows_of = {path: _count(path) for path in files[split]}
        counts[split] = sum(rows_of.values())
        if not counts[split]:
            raise ValueError(f"{files[split][0]}: has no rows")
        files[split] = [path for path, count in rows_of.items() if count]  # `datasets` stumbles over an empty one
        image, label, columns = _read_labels(files[split])
        if streaming and (len({column.declared for column in columns}) > 1 or len(label) > 1):
            raise ValueError(
                f"{root}: its files call or number their classes differently; leave hfids/ out, or write them anew"
            )
        # files may differ in what holds an image; labels were read, each by its own file
        used = {image: datasets.Image(decode=False)} | (label if streaming else {})
        options: dict[str, Any] = {"columns": list(used), "features": datasets.Features(used)}
        try:
            rows = load_files("parquet", files[split], streaming=streaming, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{_culprit(pq, files[split])}: {reason_of(error.__cause__ or error)}") from None
        parts[split] = Part(rows, image, join(columns, list(map(str, files[split]))), columns[0].declared)
    total = sum(counts.values())
    if not files["train"]:  # nobody trains
        parts["train"], counts["train"] = parts["eval"], counts["eval"]
    splits = _splits(parts, counts, str(root), streaming)
    shares = f"; trained on {size_of(splits.train):,}, evaluated on {size_of(splits.eval):,}"
    return replace(splits, found=said(total, splits.class_names, left) + shares)


def _count(path: Path) -> int:
    """How many rows a parquet file has."""
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise ValueError(f"{path}: not a readable parquet file ({reason_of(error)}); fetch it again") from None


def _read_labels(paths: Sequence[Path]) -> tuple[str, dict[str, Any], list[Column]]:
    """The name of the image column, name and kind of the first file's label column, and each file's labels by the names
    that this file declares."""
    import datasets
    import pyarrow.parquet as pq

    images: set[str] = set()
    kinds: dict[str, Any] = {}
    columns: list[Column] = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            image, label = find_columns(features, str(path))
            column = file.read(columns=[label])[label]
        except OSError as error:
            raise ValueError(f"{path}: not a readable parquet file ({reason_of(error)}); fetch it again") from None
        images.add(image)
        kinds[label] = kinds.get(label, features[label])
        columns.append(read_column(column, names_in(features[label]), partial("{}[{}]".format, path)))
    if len(images) > 1:
        raise ValueError(
            f"{paths[0]} and others call their column of images {' and '.join(sorted(images))}; choose one"
        )
    return images.pop(), kinds, columns


def open_hub(
    name: str, data_dir: Path | None, num_samples: int | None, whole: bool = False, *, streaming: bool
) -> Splits:
    """`hfds/NAME` (downloaded once, memory-mapped) or `hfids/NAME` (streamed); NAME may be a folder of parquet, or one
    that `save_to_disk` wrote.

    Raises ValueError saying what to do instead when the Hub can't be reached or has no such data set.
    """
    saved = any((local_path(name) / marker).is_file() for marker in SAVED)
    if local_path(name).is_dir() and not saved:
        return open_parquet(local_path(name), whole=whole, streaming=streaming)
    import datasets

    kind = "hfids" if streaming else "hfds"
    try:
        if saved:
            loaded = datasets.load_from_disk(str(local_path(name)))
            loaded = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        else:
            loaded = datasets.load_dataset(name, streaming=streaming, cache_dir=str(data_dir) if data_dir else None)
    except Exception as error:  # the Hub's errors have no common base: offline, gated, renamed, not a data set
        raise ValueError(
            f"{kind}/{name} could not be loaded ({reason_of(error)}); check the name and the network, "
            "or place its parquet files in a folder and give that folder to --data"
        ) from error
    kinds = {part_of(name): name for name in sorted(loaded, reverse=True)}
    chosen = kinds.get(eval_kind(set(kinds)) or "none")
    train_name = kinds.get("train") or kinds.get("")
    if whole:  # nobody trains, and the evaluated part says its classes itself
        train_name = chosen = chosen or train_name
    if train_name is None:
        raise ValueError(f"{kind}/{name} has no split to train on: {', '.join(loaded)}")
    parts = {"train": loaded[train_name]}
    if chosen:
        parts["eval"] = loaded[chosen]
    named = {"train": train_name, "eval": chosen}
    known = {part: (data.info.splits or {}).get(named[part]) for part, data in parts.items()}
    counts = {part: info.num_examples if info else 0 for part, info in known.items()}
    if num_samples:
        counts["train"] = num_samples
    title = f"{kind}/{name}"
    opened = {split: _part(data, f"{title}:{split}") for split, data in parts.items()}
    if saved and streaming:
        counts = {split: len(part.rows) for split, part in opened.items()}
        opened = {split: part._replace(rows=part.rows.to_iterable_dataset()) for split, part in opened.items()}
    unused = ", ".join(name for name in loaded if name not in named.values())
    shares = f"trained on {train_name}, evaluated on {chosen or 'a tenth of it'}"
    return replace(
        _splits(opened, counts, title, streaming), found=f"{title}: {shares}{unused and f'; not used: {unused}'}"
    )


class Part(NamedTuple):
    """A split as the library opened it, the name of its column of images, and its labels.

    labels: None where they come with the rows of a stream. declared: the names that those rows' numbers stand for.
    """

    rows: Any
    image: str
    labels: Column | None
    declared: tuple[str, ...] | None


def _part(rows: Any, title: str) -> Part:
    """A split of the Hub, its labels read where that takes no pass over a stream."""
    import datasets

    image, label = find_columns(rows.features, title)
    declared = names_in(rows.features[label])
    if isinstance(rows, datasets.Dataset):
        return Part(rows, image, column_of(rows, label, title), declared)
    if declared is None and getattr(rows.features[label], "dtype", "") in ("string", "large_string"):
        raise ValueError(
            f"{title}: its label column {label!r} holds text, whose classes a stream does not say; give hfds/"
        )
    return Part(rows, image, None, declared)


def _splits(parts: dict[str, Part], counts: dict[str, int], title: str, streaming: bool) -> Splits:
    """Splits from one or two opened parts: training says which classes there are, the other part follows by name."""
    train = parts["train"]
    classes = train.declared if train.labels is None else train.labels.classes
    labels = {
        split: positions(part.labels.names, classes or (), f"{title}:{split}")[part.labels.codes]
        for split, part in parts.items()
        if part.labels is not None
    }
    if not streaming:
        sources = [RowSource(p.rows, p.image, labels[split], f"{title}:{split}") for split, p in parts.items()]
        pair = sources if len(sources) == 2 else hold_out(sources[0], [str(i) for i in range(len(sources[0]))])
        return Splits(pair[0], pair[1], classes or ())
    if "eval" not in parts:
        raise ValueError(f"{title} has no split to evaluate on (validation, test); hfds/ would hold a tenth out")
    for split, part in parts.items():
        if not counts[split] and split == "eval":
            _, label = find_columns(part.rows.features, title)
            counts[split] = sum(1 for _ in part.rows.select_columns([label]))
        if not counts[split]:
            raise ValueError(f"{title} does not say how many images it has; give --num-samples")
    streams = {
        split: RowStream(part.rows, f"{title}:{split}", counts[split], split == "train", part.declared, classes)
        for split, part in parts.items()
    }
    return Splits(streams["train"], streams["eval"], classes or ())  # none: the caller's num_classes decides


def _culprit(pq: Any, paths: list[Path]) -> str:
    """The first file that can't be read to its end."""
    for path in paths:
        try:
            for group in range((file := pq.ParquetFile(path)).num_row_groups):
                file.read_row_group(group)
        except (OSError, ValueError):
            return str(path)
    return ", ".join(map(str, paths))
