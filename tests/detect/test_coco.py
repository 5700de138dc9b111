"""COCO files: what is read, what is refused by name, what is left out and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO

from karat.detect import coco
from karat.detect.data import load_data, open_parts
from support.data import BACK, store_turned
from support.detection import annotation, tiny, write_coco

# pycocotools itself, under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))
    return path


def test_reads_polygons_run_lengths_crowds_gaps_and_empty_images(tmp_path: Path) -> None:
    part = coco.read_coco(write_coco(tmp_path), [tmp_path])
    assert part.categories == {3: "fig", 9: "nut"}
    assert [len(picture.things) for picture in part.pictures] == [0, 1, 1, 2, 1, 1]
    assert [picture.things[0].label for picture in part.pictures[1:]] == [2, 1, 2, 1, 2]
    assert part.pictures[2].things[0].rle is not None
    assert [thing.crowd for thing in part.pictures[3].things] == [False, True]
    assert not part.skipped.total()


def test_masks_are_those_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_coco(tmp_path)
    change(path, lambda p: p["annotations"][0].update(segmentation=[[5.5, 3.2, 30.1, 8.8, 22.0, 30.7]]))
    theirs, ours = COCO(str(path)), coco.read_coco(path, [tmp_path])
    for picture in ours.pictures:
        expected = [theirs.annToMask(a) for a in theirs.loadAnns(theirs.getAnnIds(picture.id))]
        for thing, mask in zip(picture.things, expected, strict=True):
            assert np.array_equal(thing.mask(picture.size), mask)


def test_scaled_masks_keep_their_share_of_the_area(tmp_path: Path) -> None:
    part = coco.read_coco(write_coco(tmp_path), [tmp_path])
    for picture in part.pictures:
        for thing in picture.things:
            whole = thing.mask(picture.size).mean()
            assert thing.mask((160, 180), (3.0, 4.0)).mean() == pytest.approx(whole, rel=0.15)


def test_written_back_it_is_what_was_read(tmp_path: Path) -> None:
    part = coco.read_coco(write_coco(tmp_path), [tmp_path])
    (tmp_path / "again.json").write_text(json.dumps(part.as_coco()))
    again = coco.read_coco(tmp_path / "again.json", [tmp_path])
    assert again.as_coco() == part.as_coco()


def _short(plain: dict[str, Any]) -> None:
    plain["annotations"][0].update(segmentation=[[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]], bbox=[1, 1, 8, 8], area=64)
    plain["annotations"][1]["segmentation"] = [[1, 1, 9, 9]]
    plain["annotations"][2]["bbox"][2] = 0


def test_what_coco_tools_leave_out_is_left_out_and_counted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    change(tmp_path / "instances.json", _short)
    part = coco.read_coco(tmp_path / "instances.json", [tmp_path])
    assert part.skipped == {coco.SHORT_POLYGON: 2, coco.NO_SHAPE: 1, coco.NO_AREA: 1}
    assert [len(picture.things) for picture in part.pictures] == [0, 1, 0, 1, 1, 1]
    data = load_data(tiny(tmp_path))
    assert any("left out 1 objects whose box has no area" in line for line in data.skipped)


def _with(field: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["annotations"][1].update({field: value})


def _rle(counts: Any, size: Any = (40, 60)) -> dict[str, Any]:
    return {"size": list(size) if isinstance(size, tuple) else size, "counts": counts}


# field of annotation 2, what it holds, what is said
MALFORMED: list[tuple[str, Any, str]] = [
    ("image_id", [1], r"annotation 2 has the image_id \[1\]; give a whole number"),
    ("image_id", "1", "annotation 2 has the image_id '1'"),
    ("category_id", {"id": 3}, "annotation 2 has the category_id {'id': 3}; give a whole number"),
    ("category_id", True, "annotation 2 has the category_id True"),
    ("area", [5], r"annotation 2 has the area \[5\]"),
    ("area", "5", "annotation 2 has the area '5'"),
    ("area", float("nan"), "annotation 2 has the area nan"),
    ("area", -1, "annotation 2 has the area -1"),
    ("iscrowd", "0", "annotation 2 has the iscrowd '0'"),
    ("segmentation", _rle([2400], 2400), "annotation 2 has run lengths for an image of 2400"),
    ("segmentation", _rle([2400], None), "annotation 2 has run lengths for an image of None"),
    ("segmentation", _rle(["a", 2400]), "annotation 2 has the run lengths .'a', 2400"),
    ("segmentation", _rle([2500, -100]), r"annotation 2 has the run lengths \[2500, -100\]"),
    ("segmentation", _rle([None, 2400]), "annotation 2 has the run lengths .None"),
    ("segmentation", _rle(None), "annotation 2 has the run lengths None"),
    ("segmentation", _rle("abc"), "annotation 2 has run lengths that can't be decoded"),
    ("segmentation", _rle("é"), "annotation 2 has run lengths that can't be decoded"),
    ("segmentation", "x", "annotation 2 has a segmentation that is neither"),
    ("segmentation", [1, 1, 9, 1, 9, 9], "annotation 2 has the segmentation .*a flat list"),
    ("segmentation", [["1", "1", "9", "1", "9", "9"]], "annotation 2: polygon 1 is"),
    ("segmentation", [[1, 1, 9, 1, 9, 9], [1, 1, [9, 1], 9, 9, 9]], "annotation 2: polygon 2 is"),
    ("segmentation", [[1, 1, 9, 1, 9, 9, 5]], "annotation 2: polygon 1 is .*even in count"),
    ("segmentation", [[1, 1, 9, None, 9, 9]], "annotation 2: polygon 1 is"),
    ("segmentation", [[1, 1, 9, float("nan"), 9, 9]], "annotation 2: polygon 1 is"),
    ("segmentation", [[1, 1, 9, 10**400, 9, 9]], "annotation 2: polygon 1 is"),
    ("segmentation", [None], "annotation 2: polygon 1 is None"),
]

BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no images list": (lambda p: p.pop("images"), "no list 'images'"),
    "no categories": (lambda p: p["categories"].clear(), "no categories"),
    "missing image": (lambda p: p["images"][1].update(file_name="gone.png"), r"'gone\.png' is missing"),
    "unknown category": (lambda p: p["annotations"][0].update(category_id=4), r"annotation 1 is of category 4.*3, 9"),
    "unknown image": (lambda p: p["annotations"][0].update(image_id=77), "of image 77"),
    "no box": (lambda p: p["annotations"][0].pop("bbox"), "annotation 1 has the bbox None"),
    "wrong size": (lambda p: p["images"][0].update(height=0), "image 0 has height 0"),
    "run lengths": (
        lambda p: p["annotations"][1].update(segmentation={"size": [40, 60], "counts": [5, 5]}),
        "run lengths of 10 pixels",
    ),
    "other size": (
        lambda p: p["annotations"][1].update(segmentation={"size": [4, 6], "counts": [24]}),
        r"run lengths for an image of \[4, 6\]",
    ),
    **{f"annotation's {field} {value}": (_with(field, value), words) for field, value, words in MALFORMED},
    "category twice": (lambda p: p["categories"][1].update(id=9), "two categories have the id 9"),
    "twice": (lambda p: p["images"][1].update(id=0), "two images have the id 0"),
    "no objects": (lambda p: p["annotations"].clear(), "no objects to learn from"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, words = BAD[case]
    change(write_coco(tmp_path), edit)
    with pytest.raises(ValueError, match=words) as said:
        load_data(tiny(tmp_path))
    assert "instances.json" in str(said.value)
    assert "\n" not in str(said.value)


def test_broken_json_is_refused_by_name(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"instances\.json is not JSON"):
        load_data(tiny(tmp_path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="no COCO file"):
        load_data(tiny(tmp_path))


def test_layouts_and_splits(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "one")
    for data in (path, path.parent):
        train, evaluation = open_parts(tiny(data, eval_images=2))
        assert ([p.id for p in train.pictures], [p.id for p in evaluation.pictures]) == ([0, 1, 2, 3], [4, 5])
    assert len(open_parts(tiny(path, eval_images=None))[1]) == 1
    with pytest.raises(ValueError, match="--eval-images 6"):
        open_parts(tiny(path, eval_images=6))
    root = tmp_path / "coco"
    for name in ("train2017", "val2017"):
        other = write_coco(root / name)
        (root / "annotations").mkdir(exist_ok=True)
        other.rename(root / "annotations" / f"instances_{name}.json")
    train, evaluation = open_parts(tiny(root, eval_images=None))
    assert evaluation.pictures[0].path == root / "val2017" / "0.png"
    assert train.pictures[0].path == root / "train2017" / "0.png"
    with pytest.raises(ValueError, match="has an evaluation part"):
        open_parts(tiny(root, eval_images=2))
    with pytest.raises(ValueError, match="no such file or folder"):
        open_parts(tiny(tmp_path / "nowhere"))


def test_images_of_an_evaluation_file_elsewhere_are_found_beside_it(tmp_path: Path) -> None:
    """--images is about the data, whose files have the same names."""
    path, other = write_coco(tmp_path / "one"), write_coco(tmp_path / "two", 3)
    path = path.rename(tmp_path / "instances.json")
    values: dict[str, Any] = {"images": str(tmp_path / "one"), "eval_data": str(other), "eval_images": None}
    train, evaluation = open_parts(tiny(path, **values))
    assert {picture.path.parent for picture in train.pictures} == {tmp_path / "one"}
    assert {picture.path.parent for picture in evaluation.pictures} == {tmp_path / "two"}
    moved = other.rename(tmp_path / "evaluation.json")  # beside the data: its images are where --images says
    _, evaluation = open_parts(tiny(path, **values | {"eval_data": str(moved)}))
    assert {picture.path.parent for picture in evaluation.pictures} == {tmp_path / "one"}


def test_batches_of_none_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = load_data(tiny(tmp_path))
    assert [len(images) for images, _ in data.measuring(data.train_part, 3)] == [3, 1]
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        data.measuring(data.train_part, 0)


@pytest.mark.parametrize("view", ["stretch", "pad"])
def test_views_keep_boxes_masks_and_pixels_together(tmp_path: Path, view: str) -> None:
    """The object is the only bright part: wherever scale, crop and flip bring it, mask and box lie on it."""
    write_coco(tmp_path)
    settings = tiny(tmp_path, view=view, jitter=(0.5, 2.0), repeat=6)
    seen = 0
    for images, targets in load_data(settings).train:
        for image, target in zip(images, targets, strict=True):
            assert max(image.shape[1:]) <= 64
            assert target["masks"].shape[1:] == image.shape[1:]
            for box, mask in zip(target["boxes"], target["masks"].bool(), strict=True):
                rows, columns = mask.nonzero().unbind(1)
                x1, y1, x2, y2 = box.tolist()
                assert abs(int(columns.min()) - x1) <= 1.5
                assert abs(int(columns.max()) + 1 - x2) <= 1.5
                assert abs(int(rows.min()) - y1) <= 1.5
                assert abs(int(rows.max()) + 1 - y2) <= 1.5
                inner = image[0][mask]
                assert float(inner.median()) > 0.9
                seen += 1
    assert seen > 10


@pytest.mark.parametrize("orientation", BACK)
def test_boxes_lie_on_the_picture_as_it_is_shown(tmp_path: Path, orientation: int) -> None:
    part = coco.read_coco(write_coco(tmp_path), [tmp_path])
    seen = {}
    for turned in (False, True):
        if turned:
            for picture in part.pictures:
                store_turned(picture.path, orientation)
        batches = load_data(tiny(tmp_path)).measuring(part)
        seen[turned] = torch.stack([image for images, _ in batches for image in images])
    assert torch.equal(seen[True], seen[False])


def test_a_json_in_the_stored_frame_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    store_turned(tmp_path / "1.png", 6)
    change(tmp_path / "instances.json", lambda p: p["images"][1].update(width=40, height=60))
    change(tmp_path / "instances.json", lambda p: p["annotations"].clear())
    part = coco.read_coco(tmp_path / "instances.json", [tmp_path])
    write_coco(tmp_path / "other")
    with pytest.raises(ValueError, match=r"1\.png.*40x60 pixels, its JSON says 60x40.*EXIF"):
        list(load_data(tiny(tmp_path / "other")).measuring(part))


def test_crowds_are_not_trained_on_and_empty_images_are(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = load_data(tiny(tmp_path))
    counts = {int(t["image_id"]): len(t["boxes"]) for _, targets in data.train for t in targets}
    assert counts[0] == 0
    assert counts[3] == 1


def test_a_loader_started_half_way_gives_the_same(tmp_path: Path) -> None:
    write_coco(tmp_path)
    loader = load_data(tiny(tmp_path, repeat=3)).train
    whole = [images for images, _ in loader.iter_from(0)]
    later = [images for images, _ in loader.iter_from(2)]
    for left, right in zip(whole[2:], later, strict=True):
        assert all((a == b).all() for a, b in zip(left, right, strict=True))


def test_a_bad_image_is_named_or_counted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: cannot be decoded"):
        list(load_data(tiny(tmp_path)).train)
    data = load_data(tiny(tmp_path, on_bad_image="skip"))
    assert all(len(images) == 2 for images, _ in data.train)
    assert data.bad_images == 1
    change(tmp_path / "instances.json", lambda p: p["images"][2].update(width=61))
    change(tmp_path / "instances.json", lambda p: p["annotations"].pop(1))
    with pytest.raises(ValueError, match=r"2\.png.*its JSON says 40x61"):
        list(load_data(tiny(tmp_path, on_bad_image="error", seed=1, eval_images=1)).measuring(
            coco.read_coco(tmp_path / "instances.json", [tmp_path]).part([2])))  # fmt: skip


def test_compressed_run_lengths_are_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[3:20, 5:30] = 1
    packed = pycoco_mask.encode(np.asfortranarray(mask))
    shape = {"size": [40, 60], "counts": packed["counts"].decode()}
    change(path, lambda p: p["annotations"].append(annotation(50, 1, 9, [5, 3, 25, 17], segmentation=shape)))
    thing = coco.read_coco(path, [tmp_path]).pictures[1].things[1]
    assert np.array_equal(thing.mask((40, 60)), mask)
