"""One object as COCO's JSON has it: its box, its mask, its area, in the frame of the picture as it is shown.

What is made of annotations as they are found:

| an annotation has | what becomes of it |
|---|---|
| a box that reaches beyond the image | it is clipped; counted from a pixel on |
| a box of which less than a pixel is inside | left out and counted |
| a box without area, of NaN, or of shares of 0 to 1 | left out and counted; shares in all boxes: refused |
| a polygon of fewer than 3 points | left out and counted, the object with its last one |
| a mask that lies outside its box, or is empty | the object is left out and counted |
| no mask | it is trained on with its box for a mask, and has no part in the masks' figures |
| no area, or one that nothing in its box can have | the mask's, else the box's |
| a field of another kind than COCO's | refused |
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
from faster_coco_eval.core import mask as rle_api
from numpy.typing import NDArray

from karat.errors import brief, first_line

SHORT_POLYGON = "polygons of fewer than 3 points"
NO_SHAPE = "objects without a usable polygon"
NO_AREA = "objects whose box has no area"
NOT_FINITE = "objects whose box isn't made of finite numbers"
OUTSIDE = "objects of which less than a pixel lies inside the image"
SHARES = "objects whose box lies within the first pixel, as shares of 0 to 1 do"
MASK_ELSEWHERE = "objects whose mask is empty or lies outside their box"
TWICE = "annotations that the file has twice"
CLIPPED = "boxes that reach beyond their image"
WRONG_AREA = "areas that were 0, or larger than the box, by mask or box"
NO_MASK = "objects without a mask: trained on with their boxes for masks, and left out of mask AP"
DONE = {CLIPPED: "clipped", WRONG_AREA: "computed", NO_MASK: "it has"}  # what isn't left out
NAMED = 3  # annotations that are named of each reason
FARTHEST = 1e6  # pixels; drawing takes memory for every pixel of an outline, inside the image or not


@dataclass
class Account:
    """What was left out or changed: how many by reason, and the first of them by name."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, where: str, count: int = 1) -> None:
        """Count it."""
        if count:
            self.counts[reason] += count
            self.names.setdefault(reason, []).append(where)

    def lines(self) -> list[str]:
        """One for each reason."""
        first = {reason: [*found[:NAMED], *["…"] * (len(found) > NAMED)] for reason, found in self.names.items()}
        counts = self.counts.items()
        return [f"{DONE.get(why, 'left out')} {count:,} {why} ({', '.join(first[why])})" for why, count in counts]


@dataclass(frozen=True)
class Thing:
    """One annotated object, or a crowd of them.

    label: 1 to K in the order of the category ids, 0 being background. box: x1 y1 x2 y2 in the image's pixels.
    polygons: (n,2) points each; None where `rle` (COCO's run lengths, compressed) gives the mask; both None: there is
    no mask, and the box stands for it.
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
        drawn = [(points * scale).ravel().tolist() for points in self.polygons or (outline_of(self.box),)]
        return np.asarray(rle_api.decode(rle_api.merge(rle_api.frPyObjects(drawn, height, width))), dtype=np.uint8)

    @property
    def has_mask(self) -> bool:
        """Whether the mask is more than the box."""
        return self.rle is not None or self.polygons is not None

    def segmentation(self) -> dict[str, Any]:
        """As COCO's JSON has it, by its name there; nothing where there is no mask."""
        if not self.has_mask:
            return {}
        return {"segmentation": self.rle or [points.ravel().tolist() for points in self.polygons or ()]}


def outline_of(box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """The corners (4,2) of a box x1 y1 x2 y2."""
    x1, y1, x2, y2 = box
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def number_of(entry: dict[str, Any], name: str, where: str) -> int:
    """A whole number of the file; ValueError for anything else."""
    value = entry.get(name)
    if not is_number(value, 2**53) or value != int(value):
        raise ValueError(f"{where} has the {name} {brief(value)}; give a whole number")
    return int(value)


def is_number(value: Any, limit: float = FARTHEST) -> TypeGuard[float]:
    """Whether it is a number within the limit: no boolean, no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def box_of(annotation: dict[str, Any], where: str) -> list[float]:
    """x, y, width, height; NaN where one isn't finite. Raises ValueError for anything else."""
    box = annotation.get("bbox")
    numbers = (
        [v for v in box if isinstance(v, int | float) and not isinstance(v, bool)] if isinstance(box, list) else []
    )
    if numbers != box or len(numbers) != 4:
        raise ValueError(f"{where} has the bbox {brief(box)}; give [x, y, width, height]")
    return [v if is_number(v, 1e300) else math.nan for v in numbers]  # a whole number may be larger


def read_thing(
    annotation: dict[str, Any], label: int, size: tuple[int, int], account: Account, where: str, name: str
) -> Thing | None:
    """The annotation as a Thing, see the module's table; None where it is left out.

    where: the annotation for an error; name: the same for the account.
    """
    box, area, crowd = box_of(annotation, where), annotation.get("area"), annotation.get("iscrowd")
    if area is not None and not (is_number(area, FARTHEST**2) and area >= 0):
        raise ValueError(f"{where} has the area {brief(area)}; give a number of pixels, or none")
    if crowd not in (None, 0, 1):
        raise ValueError(f"{where} has the iscrowd {brief(crowd)}; give 0 or 1")
    reason = _useless(box, size)
    shape, rle, polygons = annotation.get("segmentation"), None, None
    if reason is None and isinstance(shape, dict):
        rle = _run_lengths(shape, size, where)
    elif reason is None and isinstance(shape, list) and shape:
        polygons = tuple(points for points in _polygons(shape, where) if len(points) >= 3)
        account.note(SHORT_POLYGON, name, len(shape) - len(polygons))
        reason = None if polygons else NO_SHAPE
    elif reason is None and shape not in (None, []):
        raise ValueError(f"{where} has a segmentation that is neither polygons nor run lengths")
    if reason is not None:
        account.note(reason, name)
        return None
    corners, beyond = _clipped(box, size)
    thing = Thing(label, corners, polygons, rle, bool(crowd), 0.0)
    if _elsewhere(thing):
        account.note(MASK_ELSEWHERE, name)
        return None
    account.note(CLIPPED, name, beyond > 1)
    account.note(NO_MASK, name, not thing.has_mask)
    if area is None or beyond > 1:
        return replace(thing, area=_area(thing, size))
    if not 1 <= area <= (box[2] + 1) * (box[3] + 1):
        found = _area(thing, size)
        account.note(WRONG_AREA, name, area != found)
        return replace(thing, area=found)
    return replace(thing, area=float(area))


def _useless(box: list[float], size: tuple[int, int]) -> str | None:
    """Why an object with this box can't be used; None where it can."""
    if not all(map(is_number, box)):
        return NOT_FINITE
    if box[2] <= 0 or box[3] <= 0:
        return NO_AREA
    if is_share(box) and max(size) > 1:
        return SHARES
    (x1, y1, x2, y2), beyond = _clipped(box, size)
    return OUTSIDE if beyond > 0 and min(x2 - x1, y2 - y1) < min(1, box[2], box[3]) else None


def is_share(box: list[float]) -> bool:
    """Whether all four numbers lie in 0 to 1, or a little beyond."""
    return all(-0.1 <= number <= 1.1 for number in box)


def _clipped(box: list[float], size: tuple[int, int]) -> tuple[tuple[float, float, float, float], float]:
    """x1 y1 x2 y2 of what lies inside the image, and by how many pixels the box reaches beyond it."""
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(corners, (size[1], size[0]) * 2, strict=True))
    beyond = max(abs(v - inside) for v, inside in zip(corners, (x1, y1, x2, y2), strict=True))
    return (x1, y1, x2, y2), beyond


def mask_box(thing: Thing) -> tuple[float, float, float, float] | None:
    """x1 y1 x2 y2 around the mask; None where there is none."""
    if thing.rle is not None:
        x, y, w, h = rle_api.toBbox(thing.rle).tolist()
        return x, y, x + w, y + h
    if thing.polygons is None:
        return None
    points = thing.polygons[0] if len(thing.polygons) == 1 else np.concatenate(thing.polygons)
    return (*points.min(0).tolist(), *points.max(0).tolist())


def _elsewhere(thing: Thing) -> bool:
    """Whether box and mask aren't the same object's: the mask is empty, or has no pixel within the box."""
    own = mask_box(thing)
    if own is None:
        return False
    (x1, y1, x2, y2), (a1, b1, a2, b2) = thing.box, own
    empty = a2 <= a1 and b2 <= b1
    return empty or max(x1, a1) > min(x2, a2) + 1 or max(y1, b1) > min(y2, b2) + 1


def _area(thing: Thing, size: tuple[int, int]) -> float:
    """Pixels of the mask; of the box where there is no mask, or none of its pixels."""
    x1, y1, x2, y2 = thing.box
    return float((thing.mask(size).sum() if thing.has_mask else 0) or (x2 - x1) * (y2 - y1))


def _polygons(shape: list[Any], where: str) -> list[NDArray[np.float64]]:
    """The polygons as (n,2) points each."""
    if all(map(is_number, shape)):
        raise ValueError(
            f"{where} has the segmentation {brief(shape)}, a flat list; COCO has a list of polygons: [[x, y, …], …]"
        )
    for number, points in enumerate(shape, 1):
        if not (isinstance(points, list) and len(points) % 2 == 0 and all(map(is_number, points))):
            raise ValueError(
                f"{where}: polygon {number} is {brief(points)}; give numbers [x, y, x, y, …], even in count"
            )
    return [np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in shape]


def _run_lengths(shape: dict[str, Any], size: tuple[int, int], where: str) -> dict[str, Any]:
    """Run lengths as the evaluator reads them; COCO writes crowds uncompressed."""
    if shape.get("size") != list(size):
        raise ValueError(
            f"{where} has run lengths for an image of {brief(shape.get('size'))}, the image is {list(size)}"
        )
    counts = shape.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in counts):
            raise ValueError(f"{where} has the run lengths {brief(counts)}; give whole numbers of at least 0")
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"{where} has run lengths of {sum(counts)} pixels, the image has {size[0] * size[1]}")
        counts = rle_api.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    elif not isinstance(counts, str):
        raise ValueError(f"{where} has the run lengths {brief(counts)}; give a list of numbers, or COCO's string")
    rle = {"size": list(size), "counts": counts.decode() if isinstance(counts, bytes) else counts}
    try:
        rle_api.decode(rle)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has run lengths that can't be decoded: {first_line(error)}") from None
    return rle
