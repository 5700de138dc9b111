"""COCO's JSON format read and checked: images, objects, crowds, categories (https://cocodataset.org/#format-data).

What can't be read at all is an error that names it: broken JSON, a missing list, image files that aren't there, an
annotation of an image or a category that the file doesn't have, a field that holds something else than COCO has there,
boxes in another format than COCO's. Single objects that can't be used are left out and counted, see
`karat.detect.objects`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from karat.data.labels import positions
from karat.detect.objects import (
    NAMED,
    NO_AREA,
    NO_SHAPE,
    SHORT_POLYGON,
    TWICE,
    Account,
    Thing,
    box_of,
    is_number,
    is_share,
    number_of,
    read_thing,
)
from karat.errors import brief

__all__ = ["NO_AREA", "NO_SHAPE", "SHORT_POLYGON", "CocoPart", "Picture", "Thing", "read_coco"]

_Place = tuple[Path, tuple[int, int]]  # an image's file, (height, width)


@dataclass(frozen=True)
class Picture:
    """One image: its file, its id in the JSON, (height, width), and what is in it."""

    path: Path
    id: int
    size: tuple[int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class CocoPart:
    """Images with their objects, of one JSON file or a part of it; the account is the whole file's."""

    source: Path
    pictures: tuple[Picture, ...]
    categories: dict[int, str]  # id -> name, ascending
    account: Account = field(default_factory=Account)

    @property
    def skipped(self) -> Counter[str]:
        """How many of what was left out or changed, by reason."""
        return self.account.counts

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, indices: Sequence[int]) -> CocoPart:
        """Some of the images."""
        return replace(self, pictures=tuple(self.pictures[index] for index in indices))

    def under(self, categories: dict[int, str]) -> CocoPart:
        """The same objects under the categories of other data, which are matched by name.

        Raises ValueError for objects of a category that the other data lacks, or names that are there twice.
        """
        if self.categories == categories:
            return self
        names, theirs = list(self.categories.values()), list(categories.values())
        if names == theirs:
            return replace(self, categories=dict(categories))
        if len(set(names)) < len(names):
            raise ValueError(f"{self.source} numbers its categories otherwise than training, and names aren't unique")
        used = sorted({thing.label for picture in self.pictures for thing in picture.things})
        places = positions([names[label - 1] for label in used], theirs, str(self.source))
        labels = {label: int(place) + 1 for label, place in zip(used, places, strict=True)}
        pictures = tuple(
            replace(p, things=tuple(replace(t, label=labels[t.label]) for t in p.things)) for p in self.pictures
        )
        return replace(self, pictures=pictures, categories=dict(categories))

    def as_coco(self) -> dict[str, Any]:
        """The part as COCO's JSON has it, annotations numbered anew from 1."""
        ids = list(self.categories)
        annotations: list[dict[str, Any]] = []
        for picture in self.pictures:
            for thing in picture.things:
                x1, y1, x2, y2 = thing.box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": picture.id,
                        "category_id": ids[thing.label - 1],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": thing.area,
                        "iscrowd": int(thing.crowd),
                    }
                    | thing.segmentation()
                )
        images = [
            {"id": p.id, "height": p.size[0], "width": p.size[1], "file_name": p.path.name} for p in self.pictures
        ]
        names = [{"id": number, "name": name} for number, name in self.categories.items()]
        return {"images": images, "annotations": annotations, "categories": names}


def read_coco(path: Path, folders: Sequence[Path]) -> CocoPart:
    """Read one JSON file; its images are looked for in `folders`, in this order.

    Raises ValueError for what the module's docstring calls an error.
    """
    plain = _read_json(path)
    categories: dict[int, str] = {}
    for category in plain["categories"]:
        number = number_of(category, "id", f"{path}: category {brief(category)}")
        if number in categories:
            raise ValueError(f"{path}: two categories have the id {number}")
        categories[number] = _name(category, number, path)
    if not categories:
        raise ValueError(f"{path} has no categories: there is nothing to find")
    ids = sorted(categories)
    labels = {number: index + 1 for index, number in enumerate(ids)}
    places = _places(plain["images"], folders, path)
    annotations = [
        (annotation, f"{path}: annotation {brief(annotation.get('id', '(without id)'))}")
        for annotation in plain["annotations"]
    ]
    for annotation, where in annotations:
        image_id, label_id = (number_of(annotation, name, where) for name in ("image_id", "category_id"))
        if image_id not in places:
            raise ValueError(f"{where} is of image {image_id}, which the file does not list")
        if label_id not in labels:
            raise ValueError(f"{where} is of category {label_id}; the file has {ids}")
    boxes = [(box_of(annotation, where), places[annotation["image_id"]][1]) for annotation, where in annotations]
    _refuse_other_boxes(boxes, path)
    account = Account()
    things: dict[int, list[Thing]] = {number: [] for number in places}
    seen: dict[tuple[Any, ...], list[Any]] = {}
    for annotation, where in annotations:
        file, size = places[annotation["image_id"]]
        name = f"{where.rpartition(': ')[2]} of {file.name}"
        same = seen.setdefault((annotation["image_id"], annotation["category_id"], *annotation["bbox"]), [])
        if annotation.get("segmentation") in same:
            account.note(TWICE, name)
            continue
        same.append(annotation.get("segmentation"))
        thing = read_thing(annotation, labels[annotation["category_id"]], size, account, where, name)
        if thing is not None:
            things[annotation["image_id"]].append(thing)
    pictures = tuple(
        Picture(file, number, size, tuple(things[number])) for number, (file, size) in sorted(places.items())
    )
    return CocoPart(path, pictures, {number: categories[number] for number in ids}, account)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_bytes())  # bytes: UTF-8 with or without its mark, UTF-16
    except RecursionError:
        raise ValueError(f"{path} is not COCO's: it is nested too deeply to be read") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is no COCO file: it holds a {type(plain).__name__}, not an object with images")
    for name in ("images", "annotations", "categories"):
        entries = plain.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} is no COCO file: it has no list {name!r} of objects")
    return plain


def _name(category: dict[str, Any], number: int, path: Path) -> str:
    name = category.get("name", number)
    if name is None or isinstance(name, list | dict | bool):
        raise ValueError(f"{path}: category {number} has the name {brief(name)}; give text")
    return str(name)


def _size(image: dict[str, Any], number: int, path: Path) -> tuple[int, int]:
    height: Any = image.get("height")
    width: Any = image.get("width")
    for side in (height, width):
        if not is_number(side) or side != int(side) or side <= 0:
            raise ValueError(f"{path}: image {number} has height {brief(height)} and width {brief(width)}")
    return int(height), int(width)


def _find(image: dict[str, Any], number: int, folders: Sequence[Path], path: Path) -> Path | str:
    """The image's file; its name where no folder has it.

    Names are tried as they stand, with the other system's strokes, and without their folders.
    """
    name = image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{path}: image {number} has the file_name {brief(name)}; give the file's name")
    plain = name.replace("\\", "/")
    for variant in dict.fromkeys((name, plain, plain.rpartition("/")[2])):
        for folder in folders:
            if variant and (folder / variant).is_file():
                return folder / variant
    return name


def _places(entries: Sequence[dict[str, Any]], folders: Sequence[Path], path: Path) -> dict[int, _Place]:
    """File and size of each image by its id. Raises ValueError for images that are absent, or there twice."""
    places: dict[int, _Place] = {}
    files: dict[Path, int] = {}
    absent: list[str] = []
    for image in entries:
        number = number_of(image, "id", f"{path}: image {brief(image)}")
        if number in places:
            raise ValueError(f"{path}: two images have the id {number}")
        file, size = _find(image, number, folders, path), _size(image, number, path)
        if isinstance(file, str):
            absent.append(file)
            continue
        if file in files:
            raise ValueError(
                f"{path}: images {files[file]} and {number} are the same file {str(file)!r}, each without the other's "
                "objects; list it once, or give --images the folder in which both names are there"
            )
        files[file], places[number] = number, (file, size)
    if absent:
        others = ", ".join(map(repr, absent[1:NAMED])) + (", …" if len(absent) > NAMED else "")
        more = f", and {len(absent) - 1:,} more ({others})" if others else ""
        raise ValueError(
            f"{path}: the image file {absent[0]!r} is missing{more}; looked in {', '.join(map(str, folders))}; name "
            "the images' folder with --images"
        )
    if not places:
        raise ValueError(f"{path} has no images")
    return places


def _refuse_other_boxes(boxes: Sequence[tuple[list[float], tuple[int, int]]], path: Path) -> None:
    """ValueError where all boxes, each with its image's size, are shares of it, or corners x1 y1 x2 y2."""
    if boxes and all(is_share(box) and max(size) > 1 for box, size in boxes):
        raise ValueError(
            f"{path}: its boxes are shares of the image, such as {boxes[0][0]}; COCO's are pixels: multiply x and "
            "width by the image's width, y and height by its height"
        )
    corners = [0 <= b[0] < b[2] <= size[1] and 0 <= b[1] < b[3] <= size[0] for b, size in boxes]
    beyond = [b[0] + b[2] > size[1] + 1 or b[1] + b[3] > size[0] + 1 for b, size in boxes]
    if sum(corners) >= 0.9 * len(boxes) and 2 * sum(beyond) > len(boxes):
        raise ValueError(
            f"{path}: its boxes are corners [x1, y1, x2, y2], such as {boxes[0][0]}; COCO's are [x, y, width, height]: "
            "subtract x1 from x2 and y1 from y2"
        )
