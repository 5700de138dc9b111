"""`--data`: one name for digits, folders, parquet, torchvision, Hub and sharded data, made into batches.

| spec | what it is |
|---|---|
| `digits` | scikit-learn's 1,797 scanned digits, 8×8 grey; nothing to download |
| a folder | images in train/CLASS and val/CLASS, or in CLASS alone (a tenth is held out) |
| a folder of parquet | train*.parquet, test*.parquet with an image and a label column |
| `torch/NAME` | cifar10, cifar100, mnist, fashion_mnist, kmnist, svhn, flowers102, stl10, imagenet |
| `hfds/NAME` | a data set of the Hugging Face Hub, downloaded once, memory-mapped |
| `hfids/NAME` | the same, streamed |
| `wds/FOLDER`, `wds/TRAIN::EVAL` | WebDataset shards, streamed |
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from karat.data.augment import Fit, Normalise, eval_transform, is_batched, statistics, train_transform
from karat.data.loader import Loader, ResidentLoader, Views, WorkerLoader, decode_all
from karat.data.order import BadImages, Order
from karat.data.sources import ArraySource, Source, Splits, Stream, check_labels, is_stream, size_of, take_fraction
from karat.runs.recipes import Recipe

RESIDENT_LIMIT = 512 * 2**20  # bytes of decoded pixels a split may take in memory; CIFAR-10 takes 150 MB
DEFAULT_SIZE = 224


class Data:
    """Training and evaluation batches of one data set, and what a model must know of it.

    Attributes: spec, num_classes, class_names, in_chans, img_size (side S of the images that come out),
    mean, std. `train` and `eval` are Loaders, made when first asked for: batches of images (B, in_chans,
    S, S) float32, normalised, and labels (B,) int64.
    """

    def __init__(
        self,
        spec: str,
        splits: Splits,
        *,
        img_size: int | None,
        recipe: Recipe,
        batch_size: int,
        workers: int,
        seed: int,
        on_bad_image: str,
        rank: int,
        world_size: int,
        num_classes: int | None,
        fraction: float,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        self.spec, self._splits, self._recipe, self._workers = spec, splits, recipe, workers
        self._batch_size, self._seed, self._rank, self._world_size = batch_size, seed, rank, world_size
        self._bad = BadImages(on_bad_image)
        self.class_names = splits.class_names
        self.num_classes = num_classes or len(splits.class_names)
        if not self.num_classes:
            raise ValueError(f"{spec} does not name its classes; give --num-classes")
        self.in_chans = splits.in_chans
        self.img_size = img_size or splits.native_size or DEFAULT_SIZE
        default_mean, default_std = statistics(self.in_chans)
        self.mean, self.std = tuple(mean or default_mean), tuple(std or default_std)
        self._parts: dict[str, Source | Stream] = {
            "train": take_fraction(splits.train, fraction),
            "eval": take_fraction(splits.eval, fraction),
        }
        for name, part in self._parts.items():
            check_labels(part, self.num_classes, f"{spec} ({name})")

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
        part, train, recipe = self._parts[split], split == "train", self._recipe
        title = f"{self.spec} ({split})"
        pixels = size_of(part) * self.in_chans * self.img_size**2
        if not is_stream(part) and pixels <= RESIDENT_LIMIT and (not train or is_batched(recipe)):
            resize = (1.0, recipe.train_interpolation) if train else (recipe.crop_pct, recipe.interpolation)
            images, labels = self._decoded(part, *resize)
            order = self._order(len(labels), train)
            normalise = Normalise(self.mean, self.std)
            hflip = recipe.hflip if self._splits.mirror else 0.0
            return ResidentLoader(order, self._bad, self.num_classes, title, images, labels, normalise, hflip)
        if train:
            view = train_transform(recipe, self.img_size, self.mean, self.std, mirror=self._splits.mirror)
        else:
            view = eval_transform(recipe, self.img_size, self.mean, self.std)
        order = self._order(size_of(part), train)
        source, stream = (None, part) if is_stream(part) else (part, None)
        views = Views(source, view, self.in_chans, self.img_size, order.seed)
        return WorkerLoader(order, self._bad, self.num_classes, title, views, stream=stream, workers=self._workers)

    def _order(self, n: int, train: bool) -> Order:
        return Order(
            n,
            self._batch_size,
            train=train,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            repeats=self._recipe.aug_repeats if train else 0,
        )

    def _decoded(self, part: Source, crop_pct: float, interpolation: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(part, ArraySource) and crop_pct == 1 and part.images.shape[1:3] == (self.img_size,) * 2:
            images = torch.from_numpy(np.asarray(part.images))
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
            return images, torch.from_numpy(part.labels)
        fit = Fit(self.img_size, crop_pct, interpolation)
        threads = 1 if self.img_size <= 64 else os.cpu_count() or 1
        return decode_all(part, fit, self.in_chans, self._bad, threads)


def load_data(
    spec: str,
    *,
    recipe: Recipe,
    img_size: int | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    on_bad_image: str = "error",
    rank: int = 0,
    world_size: int = 1,
    num_classes: int | None = None,
    data_dir: str | Path | None = None,
    fraction: float = 1.0,
    num_samples: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Data:
    """The batches that `--data SPEC` means.

    Args:
        spec: see the table above.
        recipe: how images are augmented, cropped and batched.
        img_size: side of the images that come out; None: the data's own where all share one, else 224.
        batch_size: per process; None: the recipe's.
        workers: processes that decode and augment; 0: this one. Has no influence on what comes out. Small images
            under a light recipe (shift and mirror) stay decoded in memory (at most 512 MiB) and use none.
        seed: of order and augmentation.
        on_bad_image: "error" or "skip".
        rank, world_size: this process and how many there are; evaluation is shared out without repeats.
        num_classes: more classes than the data has; None: as many as it has.
        data_dir: where `torch/` data lies or is downloaded to; None: $KARAT_DATA or ~/.cache/karat. With several
            processes let one call this first.
        fraction: use that share of both parts, a fixed random subset.
        num_samples: training images of a stream that does not say how many it has.
        mean, std: per channel, of pixels in [0, 1]; None: ImageNet's for colour, 0.5 for grey.

    Raises ValueError for data that is missing, empty, unreadable or unlabelled (naming the file or folder
    and what to do), and from the loaders for the first image that can't be decoded, unless
    on_bad_image="skip".

    >>> from karat.runs.recipes import RECIPES
    >>> data = load_data("digits", recipe=RECIPES["quick"])
    >>> images, labels = next(iter(data.train))
    >>> images.shape, data.num_classes
    (torch.Size([128, 1, 8, 8]), 10)
    """
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size={img_size}: give 1 or more")
    if workers < 0:
        raise ValueError(f"workers={workers}: give 0 or more")
    splits = open_splits(spec, data_dir=Path(data_dir) if data_dir else None, num_samples=num_samples)
    if is_stream(splits.train) and num_classes and not splits.class_names:
        splits.class_names = tuple(str(i) for i in range(num_classes))
    return Data(
        spec,
        splits,
        img_size=img_size,
        recipe=recipe,
        batch_size=recipe.batch_size if batch_size is None else batch_size,
        workers=workers,
        seed=seed,
        on_bad_image=on_bad_image,
        rank=rank,
        world_size=world_size,
        num_classes=num_classes,
        fraction=fraction,
        mean=mean,
        std=std,
    )


def open_splits(spec: str, *, data_dir: Path | None = None, num_samples: int | None = None) -> Splits:
    """What a spec is, without decoding an image. Raises ValueError as load_data does."""
    prefix, _, name = spec.partition("/")
    root = data_dir or Path(os.environ.get("KARAT_DATA", "~/.cache/karat")).expanduser()
    if spec == "digits":
        from karat.data.named import open_digits

        return open_digits()
    if prefix in ("torch", "hfds", "hfids", "wds") and not name:
        raise ValueError(f"data {spec!r}: name the data set after the stroke, as in torch/cifar10")
    if prefix == "torch":
        from karat.data.named import open_torch

        return open_torch(name, root)
    if prefix in ("hfds", "hfids"):
        from karat.data.hub import open_hub

        return open_hub(name, streaming=prefix == "hfids", data_dir=data_dir, num_samples=num_samples)
    if prefix == "wds":
        from karat.data.hub import open_shards

        return open_shards(name, num_samples=num_samples)
    return _open_path(spec)


def _open_path(spec: str) -> Splits:
    path = Path(spec).expanduser()
    if not path.exists():
        raise ValueError(
            f"data {spec!r}: no such folder; give a folder of images or parquet files, digits, torch/NAME, "
            "hfds/NAME, hfids/NAME or wds/SHARDS"
        )
    if not path.is_dir():
        raise ValueError(f"data {spec!r} is a file; give the folder that it lies in")
    from karat.data.folder import check_readable, open_folder

    check_readable(path)
    if next(path.glob("*.parquet"), None) or next(path.glob("*/*.parquet"), None):
        from karat.data.hub import open_parquet

        return open_parquet(path)
    return open_folder(path)
