"""A folder of images, one subfolder a class, with train/ and val/ above them or without."""

from __future__ import annotations

import os
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets

from karat.data.sources import FileSource, Source, Splits, hold_out

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "validation", "valid", "eval", "evaluation", "test")


class FolderSource(FileSource):
    """The images below one folder; a class is the name of the folder around an image (timm's reader)."""

    def __init__(self, root: Path, class_to_idx: dict[str, int] | None = None) -> None:
        found, self.class_to_idx = find_images_and_targets(str(root), class_to_idx=class_to_idx)
        super().__init__([path for path, _ in found], [label for _, label in found])
        self.root = root

    def split_name(self, index: int) -> str:
        """The file's name below the root."""
        return os.path.relpath(self[index].name, self.root)


def subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named subfolders that exists."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def check_readable(root: Path) -> None:
    """Raises ValueError naming `root`, or the first folder right below it, when it can't be listed."""
    try:
        inside = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
        for folder in inside:
            with os.scandir(folder) as entries:
                next(entries, None)
    except OSError as error:
        name = error.filename or root
        raise ValueError(f"{name}: cannot be read ({error.strerror}); check its permissions") from None


def open_folder(root: Path) -> Splits:
    """Read DIR/train + DIR/val (or validation, test, ...), or one DIR with a tenth of every class held out.

    Raises ValueError for a folder without images, without class subfolders, or whose val/ has a class that
    train/ lacks.
    """
    check_readable(root)
    train_dir, eval_dir = subfolder(root, TRAIN_NAMES), subfolder(root, EVAL_NAMES)
    train = _open(train_dir or root)
    if len(train.class_to_idx) < 2:
        (only,) = train.class_to_idx
        raise ValueError(f"{train.root} has one class only ({only!r}); put the images into one subfolder per class")
    evaluation: Source
    if train_dir and eval_dir:
        own = _open(eval_dir)
        strangers = sorted(set(own.class_to_idx) - set(train.class_to_idx))
        if strangers:
            raise ValueError(
                f"{eval_dir} has the class folder {strangers[0]!r}, which {train_dir} lacks; add it there or remove it"
            )
        part: Source = train
        evaluation = FolderSource(eval_dir, train.class_to_idx)
    else:
        part, evaluation = hold_out(train)
    names = sorted(train.class_to_idx, key=train.class_to_idx.__getitem__)
    return Splits(part, evaluation, tuple(names))


def _open(root: Path) -> FolderSource:
    check_readable(root)
    source = FolderSource(root)
    if not len(source):
        raise ValueError(
            f"{root}: no images found; put them into one subfolder per class "
            f"({', '.join(get_img_extensions())}), or give a folder with train.parquet and test.parquet"
        )
    loose = next((path for path in source.paths if Path(os.fsdecode(path)).parent == root), None)
    if loose is not None:
        raise ValueError(f"{os.fsdecode(loose)} lies in no class subfolder; move it into {root}/CLASS/")
    return source
