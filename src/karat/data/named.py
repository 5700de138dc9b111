"""Data sets known by name: `digits` (inside scikit-learn) and torchvision's, as `torch/NAME`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from karat.data.folder import open_folder
from karat.data.images import reason_of
from karat.data.sources import ArraySource, FileSource, Splits, hold_out
from karat.values import local_path

# What to place below the data folder by hand, and where it comes from, when there is no network.
FILES = {
    "cifar10": "cifar-10-batches-py/ (cifar-10-python.tar.gz, cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "cifar-100-python/ (cifar-100-python.tar.gz, cs.toronto.edu/~kriz/cifar.html)",
    "mnist": "MNIST/raw/ with the four idx files (yann.lecun.com/exdb/mnist)",
    "fashion_mnist": "FashionMNIST/raw/ with the four idx files (github.com/zalandoresearch/fashion-mnist)",
    "kmnist": "KMNIST/raw/ with the four idx files (codh.rois.ac.jp/kmnist)",
    "svhn": "train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers)",
    "flowers102": "flowers-102/: jpg/, imagelabels.mat, setid.mat (robots.ox.ac.uk/~vgg/data/flowers/102)",
    "stl10": "stl10_binary/ (stl10_binary.tar.gz, cs.stanford.edu/~acoates/stl10)",
}
DIGITS = ("mnist", "kmnist", "svhn")  # characters: mirroring changes what they say


def open_digits() -> Splits:
    """The 1,797 scanned digits of scikit-learn, 8×8 grey in 17 levels; a fifth of every class is held out.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), its test part.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, evaluation = hold_out(ArraySource(levels, digits.target, "digits"), share=0.2)
    return Splits(train, evaluation, tuple("0123456789"), in_chans=1, native_size=8, mirror=False)


def data_folder(given: str | Path | None) -> Path:
    """Where named data lies: the folder that was given, else $KARAT_DATA, else ~/.cache/karat."""
    return local_path(given or os.environ.get("KARAT_DATA", "~/.cache/karat"))


def open_torch(name: str, root: Path | None) -> Splits:
    """`torch/NAME` below `root` (None: as `data_folder` says), downloaded when missing if there is a network.

    cifar10, cifar100, mnist, fashion_mnist and kmnist come through timm's create_dataset; svhn,
    flowers102 and stl10 through torchvision, which checks every file's digest before it is read; imagenet
    is an image folder with train/ and val/. Raises ValueError saying what to place where when the data is
    neither there nor to be had.
    """
    name, root = name.lower(), data_folder(root)
    if name == "imagenet":
        return _imagenet(root)
    if name not in FILES:
        raise ValueError(f"unknown data set torch/{name}; known are {', '.join([*FILES, 'imagenet'])}")
    try:
        return replace(_OPENERS.get(name, _from_timm)(name, root), mirror=name not in DIGITS)
    except Exception as error:  # urllib, tarfile, OSError, RuntimeError: whichever way a download can fail
        raise ValueError(
            f"torch/{name} is not in {root} and could not be downloaded ({reason_of(error)}); "
            f"place {FILES[name]} there, or name another folder with --data-dir"
        ) from error


def _imagenet(root: Path) -> Splits:
    for folder in (root / "imagenet", root):
        if (folder / "train").is_dir():
            return open_folder(folder)
    raise ValueError(
        f"torch/imagenet is not in {root}: place it there as train/WNID/*.JPEG and val/WNID/*.JPEG "
        "(image-net.org asks for a registration, so it is not downloaded), or name its folder with --data-dir"
    )


def _from_timm(name: str, root: Path) -> Splits:
    from timm.data import create_dataset

    parts: list[ArraySource] = []
    for split in ("train", "validation"):
        dataset: Any = create_dataset(f"torch/{name}", root=str(root), split=split, download=True)
        parts.append(ArraySource(np.asarray(dataset.data), dataset.targets, f"{name}/{split}"))
    train, evaluation = parts
    names = tuple(str(c).split(" - ")[-1] for c in dataset.classes)
    in_chans, side = (1 if train.images.ndim == 3 else 3), train.images.shape[1]
    return Splits(train, evaluation, names, in_chans=in_chans, native_size=side)


def _channels_first(name: str, root: Path) -> Splits:
    """svhn and stl10, whose arrays are (n,C,H,W)."""
    from torchvision import datasets

    opener = {"svhn": datasets.SVHN, "stl10": datasets.STL10}[name]
    found: list[Any] = [opener(str(root), split=split, download=True) for split in ("train", "test")]
    train, evaluation = (
        ArraySource(np.ascontiguousarray(d.data.transpose(0, 2, 3, 1)), d.labels, f"{name}/{split}")
        for d, split in zip(found, ("train", "test"), strict=True)
    )
    names = tuple(map(str, getattr(found[0], "classes", range(10))))
    return Splits(train, evaluation, names, native_size=train.images.shape[1])


def _flowers102(name: str, root: Path) -> Splits:
    """Training on train + val (2,040 images), evaluation on test (6,149), the habit in transfer learning."""
    from torchvision.datasets import Flowers102

    found = {split: Flowers102(str(root), split=split, download=True) for split in ("train", "val", "test")}

    def files(*splits: str) -> FileSource:
        paths = [str(path) for split in splits for path in found[split]._image_files]
        return FileSource(paths, [label for split in splits for label in found[split]._labels])

    names = getattr(found["train"], "classes", None) or [f"flower {i}" for i in range(1, 103)]
    return Splits(files("train", "val"), files("test"), tuple(str(n) for n in names))


_OPENERS: dict[str, Callable[[str, Path], Splits]] = {
    "svhn": _channels_first,
    "stl10": _channels_first,
    "flowers102": _flowers102,
}
