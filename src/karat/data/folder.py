"""A folder of images, one subfolder a class, with train/ and val/ above them or without: which files are the data.

Hidden files and folders are none of it, nor what systems leave behind (`__MACOSX`, `Thumbs.db`). An image is what
Pillow decodes, by its file's ending. What lies in folders within a class folder belongs to the class. Layouts that
could mean two things are refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.ImageFile import StubImageFile

from karat.data.labels import positions
from karat.data.sources import FileSource, Source, Splits, hold_out

# What a part of the data is called, in any case, with "set", "data", "images" or a year behind it.
NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "tests", "testing", "tst"),
}
_PART = re.compile(
    "|".join(f"(?P<{part}>{'|'.join(names)})" for part, names in NAMES.items()).join(
        ("(?:", r")[-_ ]?(?:sets?|data|images?|imgs|split)?[-_ ]?\d*")
    )
)
WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a name: my, Train, SET
EVALUATED = ("val", "test")  # the part that is evaluated on is the first of these that is there
LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
PARQUET = ".parquet"
UNREAD = {"EPS", "MPEG"}  # formats that Pillow knows by name, and needs another program for or doesn't decode


def part_of(name: str) -> str:
    """ "train", "val", "test", or "" where a name says nothing of the kind.

    >>> part_of("Training_Set"), part_of("val2017"), part_of("trainer")
    ('train', 'val', '')
    """
    found = _PART.fullmatch(name.lower())
    return "" if found is None else str(found.lastgroup)


@cache
def image_endings() -> frozenset[str]:
    """The endings, ".webp" say, of files that Pillow decodes."""
    Image.init()
    decoded = {name for name, (opener, _) in Image.OPEN.items() if not _is_stub(opener)} - UNREAD
    decoded.add("MPO")  # which JPEG's opener opens
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in decoded)


def _is_stub(opener: object) -> bool:
    return isinstance(opener, type) and issubclass(opener, StubImageFile)


def in_order(name: str) -> tuple[list[int | str], str]:
    """What names are sorted by: numbers in them count as such, case only between equals (timm leaves these open)."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


class Listing(NamedTuple):
    """The names in one directory."""

    folders: list[str]
    files: list[str]
    hidden: list[str]  # of both


class Tree:
    """The directories of a data set, each read once, when its names are first asked for."""

    def __init__(self) -> None:
        self._read: dict[str, Listing] = {}

    def names(self, folder: str) -> Listing:
        """What lies in a folder. Raises ValueError naming one that can't be listed."""
        if folder not in self._read:
            found = Listing([], [], [])
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or entry.name.lower() in LEFT_BEHIND:
                            found.hidden.append(entry.name)
                        else:
                            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                            (found.folders if is_folder else found.files).append(entry.name)
            except OSError as error:
                raise ValueError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
            self._read[folder] = found
        return self._read[folder]

    def walk(self, folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Listing]]:
        """A folder and all below it. A link is followed, but not back to a folder that it lies in (one of `above`)."""
        here = os.path.realpath(folder)
        if here in above:
            return
        found = self.names(folder)
        yield folder, found
        for name in sorted(found.folders, key=in_order):
            yield from self.walk(os.path.join(folder, name), (*above, here))

    def has_parquet(self, folder: str) -> bool:
        """Whether parquet files lie in a folder or right below it; anywhere below it where there are no images."""
        here = self.names(folder)
        below = [self.names(os.path.join(folder, name)) for name in sorted(here.folders)]
        if any(map(is_parquet, (name for found in (here, *below) for name in found.files))):
            return True
        deeper = any(map(is_parquet, (name for _, found in self.walk(folder) for name in found.files)))
        return deeper and not self.has_images(folder)

    def has_images(self, folder: str) -> bool:
        """Whether an image lies in a folder or below it."""
        return any(is_image(file) for _, found in self.walk(folder) for file in found.files)


def is_image(file: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.path.splitext(file)[1].lower() in image_endings()


def is_parquet(file: str) -> bool:
    """Whether a file's name ends as those of parquet do."""
    return file.lower().endswith(PARQUET)


@dataclass
class LeftOut:
    """What of a folder isn't used, and how much of it."""

    files: Counter[str] = field(default_factory=Counter)  # by ending
    folders: list[str] = field(default_factory=list)

    def count(self, folder: str, found: Listing, used: Sequence[str]) -> None:
        """Add what a directory holds beside the files that are used."""
        chosen = set(used)
        self.files.update(
            os.path.splitext(file)[1].lower() or "no ending" for file in found.files if file not in chosen
        )
        for name in found.hidden:
            path = os.path.join(folder, name)
            self.files["hidden"] += sum(len(files) for *_, files in os.walk(path)) if os.path.isdir(path) else 1

    def __str__(self) -> str:
        total = sum(self.files.values())
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.files.most_common() if count)
        files = f"; {total:,} file{'s' if total > 1 else ''} left out: {kinds}" if total else ""
        named = ", ".join(self.folders[:5]) + (f" and {len(self.folders) - 5:,} more" if len(self.folders) > 5 else "")
        return files + (f"; not used: {named}" if named else "")


def open_folder(root: Path, tree: Tree | None = None, *, whole: bool = False) -> Splits:
    """Read DIR/train + DIR/val (test, or a like name), or one DIR with a tenth of every class held out.

    whole: it is to be evaluated on alone: all of a DIR without a part for that.

    Raises ValueError for a folder without images, without class subfolders, whose val/ has a class that train/ lacks,
    or whose layout could mean two things.
    """
    tree, left = tree or Tree(), LeftOut()
    parts = find_parts(root, tree, left, training=not whole)
    own = next((parts[name] for name in EVALUATED if name in parts), None)
    folder = own if whole and own else parts.get("train", root)
    if folder != root:
        left.count(str(root), tree.names(str(root)), ())
        left.folders += [f"{path.name}/" for path in parts.values() if path not in (folder, own)]
    found = _images(folder, tree, left)
    names = sorted({name for _, name in found}, key=in_order)
    if whole:
        part = _source(found, names)
        return Splits(part, part, tuple(names), found=said(len(found), names, left))
    if len(names) < 2:
        raise ValueError(
            f"{folder} has one class only ({names[0]!r}){left}; put the images into one subfolder per class"
        )
    train = _source(found, names)
    if own is None:
        part, evaluation = hold_out(train, [os.path.relpath(path, folder) for path, _ in found])
        shares = f"; trained on {len(part):,}, evaluated on {len(evaluation):,} of them"
        return Splits(part, evaluation, tuple(names), found=said(len(train), names, left) + shares)
    held = _images(own, tree, left)
    positions(sorted({name for _, name in held}), names, str(own), str(folder))
    shares = f"; trained on {len(found):,} in {folder.name}/, evaluated on {len(held):,} in {own.name}/"
    line = said(len(found) + len(held), names, left) + shares
    return Splits(train, _source(held, names), tuple(names), found=line)


def said(count: int, names: Sequence[str], left: LeftOut) -> str:
    """What is used and what is left out, in a line."""
    classes = f" in {len(names)} class{'es' if len(names) != 1 else ''}" if names else ""
    return f"{count:,} images{classes}{left}"


def find_parts(root: Path, tree: Tree, left: LeftOut, *, training: bool) -> dict[str, Path]:
    """The folders of training, validation and test images by their names in NAMES; none where `root` has the classes.

    Raises ValueError where two have one meaning, where class folders stand beside a part that is evaluated on, and
    where there is nothing to train on, so that no image of a test set is trained on.
    """
    folders = sorted(tree.names(str(root)).folders, key=in_order)
    parts: dict[str, Path] = {}
    others = [name for name in folders if not part_of(name)]
    filled = [name for name in others if tree.has_images(str(root / name))]
    for name in folders:
        part, path = part_of(name), root / name
        if not part or (part == "train" and filled and _is_class(str(path), tree)):  # the vehicle
            continue
        if part in parts:
            raise ValueError(f"{root} has {parts[part].name}/ and {name}/, which mean the same: leave one")
        parts[part] = path
    if parts and "train" not in parts and filled:
        odd = next(iter(parts.values())).name
        raise ValueError(
            f"{root} has class folders ({filled[0]}/) beside {odd}/: put them into train/, {odd}/ too if it is a class"
        )
    if parts and "train" not in parts and training:
        found = next(iter(parts.values()))
        raise ValueError(f"{root} has {found.name}/ and no train/; to train on it, give {found}")
    if not parts:
        _check_called(root, [name for name in filled if not _is_class(str(root / name), tree)])
    left.folders += [f"{name}/" for name in others] if parts else []
    return parts


def _check_called(root: Path, folders: Sequence[str]) -> None:
    """Raise ValueError where one folder of folders has a word for training in its name, and another one for evaluation
    (my_train_v2, CatsTest).

    Taken as classes, they would have test images trained on.
    """
    called: dict[str, str] = {}
    for name in folders:
        kinds = {kind for word in WORD.findall(name) if (kind := part_of(word))}
        if len(kinds) == 1:
            called[kinds.pop()] = name
    held = next((called[part] for part in EVALUATED if part in called), None)
    if "train" in called and held is not None:
        raise ValueError(
            f"{root} has {called['train']}/ and {held}/, which may be parts or classes: call them train/ and test/ if "
            "they are parts, or move their images up if they are classes"
        )


def _is_class(folder: str, tree: Tree) -> bool:
    found = tree.names(folder)
    return not found.folders and any(is_image(file) for file in found.files)


def _images(root: Path, tree: Tree, left: LeftOut) -> list[tuple[str, str]]:
    """The images below a folder in the order of their paths, numbers counting as such, with their classes."""
    here, place = tree.names(str(root)), os.path.realpath(root)
    above = (place, *map(str, Path(place).parents))
    loose = sorted(filter(is_image, here.files), key=in_order)
    left.count(str(root), here, loose)
    found: list[tuple[str, str]] = []
    owned = {os.path.realpath(root / name) for name in here.folders}
    inner: dict[str, set[str]] = {}  # class folders -> the folders right in them that images lie in, "" for themselves
    for name in sorted(here.folders, key=in_order):
        before = len(found)
        top = str(root / name)
        for folder, listing in tree.walk(top, above):
            if _is_anothers(folder, top, owned):
                left.folders.append(f"{os.path.relpath(folder, root)}/ (a link to another class)")
                continue
            images = [file for file in listing.files if is_image(file)]
            left.count(folder, listing, images)
            found += [(os.path.join(folder, file), name) for file in images]
            if images:
                below = os.path.relpath(folder, top) if folder != top else ""
                _check_inner(root / name, below)
                inner.setdefault(name, set()).add(below.split(os.sep)[0])
        if len(found) == before:
            left.folders.append(f"{name}/ (no images)")
    if not found and not loose:
        raise ValueError(
            f"{root}: no images found{left}; put them into one subfolder per class, or give a folder with train.parquet"
            " and test.parquet"
        )
    if loose:
        raise ValueError(f"{root / loose[0]} lies in no class subfolder; move it into {root}/CLASS/")
    _check_levels(root, inner)
    return sorted(found, key=lambda image: in_order(image[0]))


def _is_anothers(folder: str, top: str, owned: set[str]) -> bool:
    """Whether a folder below the class folder `top` lies, by a link, in another of the class folders `owned`."""
    here = Path(os.path.realpath(folder))
    owner = next((str(path) for path in (here, *here.parents) if str(path) in owned), None)
    return owner is not None and owner != os.path.realpath(top)


def _check_inner(top: Path, below: str) -> None:
    """Raise ValueError where a class folder has parts of its own: they would be taken together."""
    inside = next((part for part in below.split(os.sep) if part_of(part)), None)
    if inside is not None:
        raise ValueError(
            f"{top / below}: {inside}/ within the class folder {top.name}/ would be taken together with the rest; give "
            f"{top}, or put train/ and test/ above the class folders"
        )


def _check_levels(root: Path, inner: dict[str, set[str]]) -> None:
    """Raise ValueError where the classes may be the folders one level further down.

    That is so where all hold folders and no images, some of them several, and no two of these have a common name, as
    parts of classes would (session1, session2).
    """
    counts = Counter(below for folders in inner.values() for below in folders)
    several = next((name for name, folders in inner.items() if len(folders) > 1), None)
    if several is not None and not counts[""] and max(counts.values()) == 1:
        first, second = sorted(inner[several], key=in_order)[:2]
        raise ValueError(
            f"{root / several} holds {first}/, {second}/ and no images: move the images up if the class is {several}, "
            "or these folders if they are classes"
        )


def _source(found: list[tuple[str, str]], names: list[str]) -> Source:
    number = {name: index for index, name in enumerate(names)}
    return FileSource([path for path, _ in found], [number[name] for _, name in found])
