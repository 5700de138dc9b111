"""`--data`: one name for digits, folders, parquet, torchvision, Hub and sharded data, made into batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from karat.data.augmentation import Augmentation, eval_transform, train_transform
from karat.data.folder import Tree, open_folder
from karat.data.hub import open_hub, open_parquet
from karat.data.images import Fit, Normalise, statistics
from karat.data.labels import relabel
from karat.data.loader import Loader, ResidentLoader, Views, WorkerLoader, decode_all
from karat.data.named import open_digits, open_torch
from karat.data.order import BadImages, ImageOrder
from karat.data.shards import open_shards
from karat.data.sources import (
    ArraySource,
    Source,
    Splits,
    Stream,
    check_labels,
    is_stream,
    set_aside,
    size_of,
    take_fraction,
)
from karat.values import local_path

RESIDENT_LIMIT = 512 * 2**20  # bytes of decoded pixels a split may take in memory; CIFAR-10 takes 150 MB
DEFAULT_SIZE = 224
# What a prefix opens, given the name behind it, the folder that it lies in or is downloaded to, a stream's length, and
# whether it is only evaluated on.
OPENERS: dict[str, Callable[[str, Path | None, int | None, bool], Splits]] = {
    "torch": lambda name, root, count, whole: open_torch(name, root),
    "hfds": partial(open_hub, streaming=False),
    "hfids": partial(open_hub, streaming=True),
    "wds": lambda name, root, count, whole: open_shards(name, num_samples=count, whole=whole),
}


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how its images and batches come out.

    spec: digits, a folder, or PREFIX/NAME with a prefix of `OPENERS`; see the table of docs/training.md.
    augmentation: how images are seen in training and in evaluation.
    batch_size: images per process and batch.
    img_size: side of the images that come out; None: the data's own where all share one, else 224.
    workers: processes that decode and augment; 0: this one. Has no influence on what comes out. Small images
        under a light recipe (shift and mirror) stay decoded in memory (at most 512 MiB) and use none.
    seed: of order and augmentation.
    on_bad_image: "error" or "skip".
    rank, world_size: this process and how many there are; evaluation is shared out without repeats.
    num_classes: more classes than the data has; None: as many as it has.
    data_dir: where `torch/` data lies or is downloaded to; None: $KARAT_DATA or ~/.cache/karat. With several
        processes let one open it first.
    fraction: use that share of both parts, a fixed random subset.
    num_samples: training images of a stream that does not say how many it has.
    held_out: so many training images, a fixed random part, are evaluated on in place of the evaluation part; 0: none.
    classes: those of a model that is measured or looked at, in its order: labels follow them by name.
    whole: a folder without an evaluation part is evaluated on in full, and none of it held out or trained on.

    Raises ValueError for a size below 1 or workers below 0.
    """

    spec: str
    augmentation: Augmentation
    batch_size: int = 128
    img_size: int | None = None
    workers: int = 0
    seed: int = 0
    on_bad_image: str = "error"
    rank: int = 0
    world_size: int = 1
    num_classes: int | None = None
    data_dir: str | Path | None = None
    fraction: float = 1.0
    num_samples: int | None = None
    held_out: int = 0
    whole: bool = False
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.img_size is not None and self.img_size < 1:
            raise ValueError(f"img_size={self.img_size}: give 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: give 0 or more")


class Data:
    """Training and evaluation batches of one data set, and what a model must know of it.

    Attributes: options, num_classes, class_names, in_chans, img_size (side S of the images that come out), found (what
    is used and left out, in a line, or nothing). `train` and `eval` are Loaders, made when first asked for: batches of
    images (B, in_chans, S, S) float32, normalised, and labels (B,) int64.
    """

    def __init__(self, options: DataOptions, splits: Splits) -> None:
        self.options, self.mirror, self.found = options, splits.mirror, splits.found
        self._bad = BadImages(options.on_bad_image)
        # a stream may not name its classes
        self._names = splits.class_names or tuple(map(str, range(options.num_classes or 0)))
        self.class_names = options.classes or self._names
        self.num_classes = options.num_classes or len(self.class_names)
        if not self.num_classes:
            raise ValueError(f"{options.spec} does not name its classes; give --num-classes")
        self.in_chans = splits.in_chans
        self.img_size = options.img_size or splits.native_size or DEFAULT_SIZE
        held_out = options.held_out
        train, evaluation = set_aside(splits.train, held_out) if held_out else (splits.train, splits.eval)
        if held_out:  # the evaluation images stay unseen
            self.found = (
                f"{options.spec}: trained on {size_of(train):,} images, evaluated on {held_out:,} held out of them"
            )
        self._parts: dict[str, Source | Stream] = {
            "train": take_fraction(train, options.fraction),
            "eval": take_fraction(evaluation, options.fraction),
        }
        if options.classes is not None:  # the training part, which may not be needed, follows with its loader
            self._parts["eval"] = self._part("eval")
            return
        for name, part in self._parts.items():
            check_labels(part, self.num_classes, f"{options.spec} ({name})")

    def _part(self, split: str) -> Source | Stream:
        """A part with its labels in the order of `class_names`."""
        part, names = self._parts[split], self.options.classes
        return part if names is None else relabel(part, self._names, names, f"{self.options.spec}:{split}", "the model")

    @property
    def counts(self) -> dict[str, int]:
        """How many images an epoch trains on and how many are evaluated on, as train_images and eval_images."""
        return {f"{name}_images": size_of(part) for name, part in self._parts.items()}

    @property
    def bad_images(self) -> int:
        """How many images could not be decoded so far (under on_bad_image="skip"), each counted once."""
        return len(self._bad.names)

    @cached_property
    def train(self) -> Loader:
        """Shuffled, augmented batches of the training part."""
        return self._loader("train")

    @cached_property
    def eval(self) -> Loader:
        """Every image of the evaluation part once, over all processes together, in a fixed order."""
        return self._loader("eval")

    def _loader(self, split: str) -> Loader:
        train, seen = split == "train", self.options.augmentation
        part = self._part(split) if train else self._parts[split]
        title = f"{self.options.spec} ({split})"
        pixels = size_of(part) * self.in_chans * self.img_size**2
        if not is_stream(part) and pixels <= RESIDENT_LIMIT and (not train or seen.is_batched):
            resize = (1.0, seen.train_interpolation) if train else (seen.crop_pct, seen.interpolation)
            images, labels = self._decoded(part, *resize)
            order = self._order(len(labels), train)
            normalise = Normalise(*statistics(self.in_chans))
            hflip = seen.hflip if self.mirror else 0.0
            return ResidentLoader(order, self._bad, self.num_classes, title, images, labels, normalise, hflip)
        if train:
            view = train_transform(seen, self.img_size, self.in_chans, mirror=self.mirror)
        else:
            view = eval_transform(seen, self.img_size, self.in_chans)
        order = self._order(size_of(part), train)
        source, stream = (None, part) if is_stream(part) else (part, None)
        views = Views(source, view, self.in_chans, self.img_size, order.seed)
        workers = self.options.workers
        return WorkerLoader(order, self._bad, self.num_classes, title, views, stream=stream, workers=workers)

    def _order(self, n: int, train: bool) -> ImageOrder:
        o = self.options
        repeats = o.augmentation.aug_repeats if train else 0
        return ImageOrder(
            n, o.batch_size, train=train, seed=o.seed, rank=o.rank, world_size=o.world_size, repeats=repeats
        )

    def _decoded(self, part: Source, crop_pct: float, interpolation: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(part, ArraySource) and crop_pct == 1 and part.images.shape[1:3] == (self.img_size,) * 2:
            images = torch.from_numpy(np.asarray(part.images))
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
            return images, torch.from_numpy(part.labels)
        fit = Fit(self.img_size, crop_pct, interpolation)
        threads = 1 if self.img_size <= 64 else os.cpu_count() or 1
        return decode_all(part, fit, self.in_chans, self._bad, threads)


class Opener:
    """Opens a `--data` when something of it is first asked for; asked again, it hands out what it has.

    One goes from the command line to settings, model and trainer, so that no folder is read twice, and from run to run
    of a comparison, so that those that read the same share what is in memory.
    """

    def __init__(self) -> None:
        self._splits: tuple[tuple[str | int | None, ...], Splits] | None = None
        self._data: Data | None = None

    def splits(
        self, spec: str, data_dir: str | Path | None = None, num_samples: int | None = None, *, whole: bool = False
    ) -> Splits:
        """As `open_splits`."""
        key = (spec, whole) if is_path(spec) else (spec, whole, str(data_dir), num_samples)
        if self._splits is None or self._splits[0] != key:
            self._splits = self._data = None  # they go before the next are opened
            self._splits = key, open_splits(spec, Path(data_dir) if data_dir else None, num_samples, whole=whole)
        return self._splits[1]

    def data(self, options: DataOptions) -> Data:
        """As `load_data`."""
        if self._data is None or self._data.options != options:
            self._data = None
            o = options
            self._data = Data(o, self.splits(o.spec, o.data_dir, o.num_samples, whole=o.whole))
        return self._data


def load_data(options: DataOptions) -> Data:
    """The batches that the options ask for.

    Raises ValueError for data that is missing, empty, unreadable or unlabelled (naming the file or folder
    and what to do), and from the loaders for the first image that can't be decoded, unless
    on_bad_image="skip".

    >>> data = load_data(DataOptions("digits", Augmentation(train_crop_mode="pad"), batch_size=100))
    >>> images, labels = next(iter(data.train))
    >>> images.shape, data.num_classes
    (torch.Size([100, 1, 8, 8]), 10)
    """
    return Opener().data(options)


def is_path(spec: str) -> bool:
    """Whether a spec is the path of a folder, and no name."""
    return spec != "digits" and spec.partition("/")[0] not in OPENERS


def same_data(one: str, other: str) -> bool:
    """Whether two specs mean the same data: alike in words, or paths of one folder."""
    if is_path(one) and is_path(other):
        return local_path(one).resolve() == local_path(other).resolve()
    return one == other


def open_splits(
    spec: str, data_dir: Path | None = None, num_samples: int | None = None, *, whole: bool = False
) -> Splits:
    """What a spec is, without decoding an image. Raises ValueError as load_data does.

    whole: as in DataOptions.
    """
    prefix, _, name = spec.partition("/")
    if spec == "digits":
        return open_digits()
    if prefix not in OPENERS:
        return _open_path(spec, whole)
    if not name:
        raise ValueError(f"data {spec!r}: name the data set after the stroke, as in torch/cifar10")
    return OPENERS[prefix](name, data_dir, num_samples, whole)


def _open_path(spec: str, whole: bool) -> Splits:
    path = local_path(spec)
    if not path.exists():
        raise ValueError(
            f"data {spec!r}: no such folder; give a folder of images or parquet files, digits, or "
            f"{'/NAME, '.join(OPENERS)}/NAME"
        )
    if not path.is_dir():
        raise ValueError(f"data {spec!r} is a file; give the folder that it lies in")
    tree = Tree()
    return (open_parquet if tree.has_parquet(str(path)) else open_folder)(path, tree, whole=whole)
