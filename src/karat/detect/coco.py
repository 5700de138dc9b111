"""COCO's JSON format read and checked: images, objects, crowds, categories (https://cocodataset.org/#format-data).

What can't be read at all is an error that names it: broken JSON, a missing list or image file, an annotation of an
image or a category that the file doesn't have, a field that holds something else than COCO has there. What COCO's tools
leave out is left out and counted: a polygon of fewer than three points, an object whose box has no area.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle_api
from numpy.typing import NDArray

from karat.errors import first_line

SHORT_POLYGON = "polygons of fewer than 3 points"
NO_SHAPE = "objects without a usable polygon"
NO_AREA = "objects whose box has no area"
FARTHEST = 1e6  # pixels; drawing takes memory for every pixel of an outline, inside the image or not


@dataclass(frozen=True)
class Thing:
    """One annotated object, or a crowd of them.

    label: 1 to K in the order of the category ids, 0 being background. box: x1 y1 x2 y2 in the image's pixels.
    polygons: (n,2) points each; None where `rle` (COCO's run lengths, compressed) gives the mask; both None: the box.
    """

    label: int
    box: tuple[float, float, float, float]
    polygons: tuple[NDArray[np.float64], ...] | None
    rle: dict[str, Any] | None
    crowd: bool
    area: float

    def mask(self, size: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> NDArray[np.uint8]:
        """(height, width) uint8, 1 inside, of the image scaled by (x, y) to `size`. Polygons are scaled, then drawn."""
        height, width = size
        if self.rle is not None:
            whole = np.asarray(rle_api.decode(self.rle), dtype=np.uint8)
            if whole.shape == size:
                return whole
            rows = np.minimum(((np.arange(height) + 0.5) / scale[1]).astype(int), whole.shape[0] - 1)
            columns = np.minimum(((np.arange(width) + 0.5) / scale[0]).astype(int), whole.shape[1] - 1)
            return whole[rows[:, None], columns[None]]
        x1, y1, x2, y2 = self.box
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        drawn = [(points * scale).ravel().tolist() for points in self.polygons or (outline,)]
        return np.asarray(rle_api.decode(rle_api.merge(rle_api.frPyObjects(drawn, height, width))), dtype=np.uint8)

    def segmentation(self) -> Any:
        """As COCO's JSON has it."""
        if self.rle is not None:
            return self.rle
        x1, y1, x2, y2 = self.box
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        return [points.ravel().tolist() for points in self.polygons or (outline,)]


@dataclass(frozen=True)
class Picture:
    """One image: its file, its id in the JSON, (height, width), and what is in it."""

    path: Path
    id: int
    size: tuple[int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class CocoPart:
    """Images with their objects, of one JSON file or a part of it; skipped counts what was left out, by reason."""

    source: Path
    pictures: tuple[Picture, ...]
    categories: dict[int, str]  # id -> name, ascending
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, indices: Sequence[int]) -> CocoPart:
        """Some of the images."""
        return replace(self, pictures=tuple(self.pictures[index] for index in indices))

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
                        "segmentation": thing.segmentation(),
                    }
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
        number = _number(category, "id", f"{path}: category {_brief(category)}")
        if number in categories:
            raise ValueError(f"{path}: two categories have the id {number}")
        categories[number] = str(category.get("name", number))
    if not categories:
        raise ValueError(f"{path} has no categories: there is nothing to find")
    ids = sorted(categories)
    labels = {number: index + 1 for index, number in enumerate(ids)}
    places: dict[int, tuple[Path, tuple[int, int]]] = {}
    for image in plain["images"]:
        number = _number(image, "id", f"{path}: image {_brief(image)}")
        if number in places:
            raise ValueError(f"{path}: two images have the id {number}")
        places[number] = (_find(str(image.get("file_name", "")), folders, path), _size(image, number, path))
    if not places:
        raise ValueError(f"{path} has no images")
    skipped: Counter[str] = Counter()
    things: dict[int, list[Thing]] = {number: [] for number in places}
    for annotation in plain["annotations"]:
        where = f"{path}: annotation {_brief(annotation.get('id', '(without id)'))}"
        image_id, label_id = (_number(annotation, name, where) for name in ("image_id", "category_id"))
        if image_id not in places:
            raise ValueError(f"{where} is of image {image_id}, which the file does not list")
        if label_id not in labels:
            raise ValueError(f"{where} is of category {label_id}; the file has {ids}")
        thing = _thing(annotation, labels[label_id], places[image_id][1], skipped, where)
        if thing is not None:
            things[image_id].append(thing)
    pictures = tuple(
        Picture(file, number, size, tuple(things[number])) for number, (file, size) in sorted(places.items())
    )
    return CocoPart(path, pictures, {number: categories[number] for number in ids}, skipped)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
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


def _number(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} has the {name} {_brief(value)}; give a whole number")
    return value


def _is_number(value: Any, limit: float = FARTHEST) -> bool:
    """Whether it is a number within the limit: no boolean, no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def _brief(value: Any) -> str:
    """A value of the file in a line that is read by people."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _size(image: dict[str, Any], number: int, path: Path) -> tuple[int, int]:
    height, width = image.get("height"), image.get("width")
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
        raise ValueError(f"{path}: image {number} has height {height!r} and width {width!r}")
    return height, width


def _find(name: str, folders: Sequence[Path], path: Path) -> Path:
    for folder in folders:
        if name and (folder / name).is_file():
            return folder / name
    looked = ", ".join(map(str, folders))
    raise ValueError(f"{path}: the image file {name!r} is missing; looked in {looked}; name its folder with --images")


def _thing(
    annotation: dict[str, Any], label: int, size: tuple[int, int], skipped: Counter[str], where: str
) -> Thing | None:
    """The annotation as a Thing; None, and counted, where COCO's tools leave it out."""
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(number, int | float) for number in box)):
        raise ValueError(f"{where} has the bbox {_brief(box)}; give [x, y, width, height]")
    area, crowd = annotation.get("area"), annotation.get("iscrowd", 0)
    if area is not None and not (_is_number(area, FARTHEST**2) and area >= 0):
        raise ValueError(f"{where} has the area {_brief(area)}; give a number of pixels, or none")
    if crowd not in (0, 1):
        raise ValueError(f"{where} has the iscrowd {_brief(crowd)}; give 0 or 1")
    if not (all(map(_is_number, box)) and box[2] > 0 and box[3] > 0):
        skipped[NO_AREA] += 1
        return None
    shape, rle, polygons = annotation.get("segmentation"), None, None
    if isinstance(shape, dict):
        rle = _run_lengths(shape, size, where)
    elif isinstance(shape, list) and shape:
        polygons = tuple(points for points in _polygons(shape, where) if len(points) >= 3)
        skipped[SHORT_POLYGON] += len(shape) - len(polygons)
        if not polygons:
            skipped[NO_SHAPE] += 1
            return None
    elif shape not in (None, []):
        raise ValueError(f"{where} has a segmentation that is neither polygons nor run lengths")
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    thing = Thing(label, corners, polygons, rle, bool(crowd), 0.0)
    return replace(thing, area=float(thing.mask(size).sum() if area is None else area))


def _polygons(shape: list[Any], where: str) -> list[NDArray[np.float64]]:
    """The polygons as (n,2) points each."""
    if all(map(_is_number, shape)):
        raise ValueError(
            f"{where} has the segmentation {_brief(shape)}, a flat list; COCO has a list of polygons: [[x, y, …], …]"
        )
    for number, points in enumerate(shape, 1):
        if not (isinstance(points, list) and len(points) % 2 == 0 and all(map(_is_number, points))):
            raise ValueError(
                f"{where}: polygon {number} is {_brief(points)}; give numbers [x, y, x, y, …], even in count"
            )
    return [np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in shape]


def _run_lengths(shape: dict[str, Any], size: tuple[int, int], where: str) -> dict[str, Any]:
    """Run lengths as the evaluator reads them; COCO writes crowds uncompressed."""
    if shape.get("size") != list(size):
        raise ValueError(
            f"{where} has run lengths for an image of {_brief(shape.get('size'))}, the image is {list(size)}"
        )
    counts = shape.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts):
            raise ValueError(f"{where} has the run lengths {_brief(counts)}; give whole numbers of at least 0")
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"{where} has run lengths of {sum(counts)} pixels, the image has {size[0] * size[1]}")
        counts = rle_api.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    elif not isinstance(counts, str):
        raise ValueError(f"{where} has the run lengths {_brief(counts)}; give a list of numbers, or COCO's string")
    rle = {"size": list(size), "counts": counts.decode() if isinstance(counts, bytes) else counts}
    try:
        rle_api.decode(rle)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has run lengths that can't be decoded: {first_line(error)}") from None
    return rle
