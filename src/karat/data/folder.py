"""A folder of images, one subfolder a class, with train/ and val/ above them or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from karat.data.sources import FileSource, Source, Splits, hold_out

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "validation", "valid", "eval", "evaluation", "test")


class Listing(NamedTuple):
    """The names in one directory."""

    folders: list[str]
    files: list[str]


class Tree:
    """The directories of a data set, each read once, when its names are first asked for."""

    def __init__(self) -> None:
        self._read: dict[str, Listing] = {}

    def names(self, folder: str) -> Listing:
        """What lies in a folder. Raises ValueError naming one that can't be listed."""
        if folder not in self._read:
            found = Listing([], [])
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        (found.folders if entry.is_dir() else found.files).append(entry.name)
            except OSError as error:
                raise ValueError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
            self._read[folder] = found
        return self._read[folder]

    def has_parquet(self, folder: str) -> bool:
        """Whether parquet files lie in a folder or right below it."""
        here = self.names(folder)
        below = [self.names(os.path.join(folder, name)) for name in sorted(here.folders)]
        return any(name.endswith(".parquet") for found in (here, *below) for names in found for name in names)

    def images(self, folder: str, name: str = "") -> Iterator[tuple[str, str]]:
        """The paths of all images below a folder, each with its class: the folder around it, `name` for this one."""
        types = get_img_extensions(as_set=True)
        here = self.names(folder)
        for below in here.folders:
            yield from self.images(os.path.join(folder, below), below)
        for file in here.files:
            if os.path.splitext(file)[1].lower() in types:
                yield os.path.join(folder, file), name


def open_folder(root: Path, tree: Tree | None = None) -> Splits:
    """Read DIR/train + DIR/val (or validation, test, ...), or one DIR with a tenth of every class held out.

    Raises ValueError for a folder without images, without class subfolders, or whose val/ has a class that
    train/ lacks.
    """
    tree = tree or Tree()
    train_dir, eval_dir = subfolder(root, TRAIN_NAMES), subfolder(root, EVAL_NAMES)
    folder = train_dir or root
    found = _images(folder, tree)
    names = sorted({name for _, name in found}, key=natural_key)
    if len(names) < 2:
        raise ValueError(f"{folder} has one class only ({names[0]!r}); put the images into one subfolder per class")
    train = _source(found, names)
    if not (train_dir and eval_dir):
        part, evaluation = hold_out(train, [os.path.relpath(path, folder) for path, _ in found])
        return Splits(part, evaluation, tuple(names))
    own = _images(eval_dir, tree)
    strangers = sorted({name for _, name in own} - set(names))
    if strangers:
        raise ValueError(
            f"{eval_dir} has the class folder {strangers[0]!r}, which {train_dir} lacks; add it there or remove it"
        )
    return Splits(train, _source(own, names), tuple(names))


def subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named subfolders that exists."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def _images(root: Path, tree: Tree) -> list[tuple[str, str]]:
    """The images below a folder in the order of their paths, numbers counting as such, with their classes."""
    found = sorted(tree.images(str(root)), key=lambda image: natural_key(image[0]))
    if not found:
        raise ValueError(
            f"{root}: no images found; put them into one subfolder per class "
            f"({', '.join(get_img_extensions())}), or give a folder with train.parquet and test.parquet"
        )
    loose = next((path for path, name in found if not name), None)
    if loose is not None:
        raise ValueError(f"{loose} lies in no class subfolder; move it into {root}/CLASS/")
    return found


def _source(found: list[tuple[str, str]], names: list[str]) -> Source:
    number = {name: index for index, name in enumerate(names)}
    return FileSource([path for path, _ in found], [number[name] for _, name in found])
