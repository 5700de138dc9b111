"""COCO files as they are found: what is used all the same, what is left out and counted by name, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from karat import cli, runs
from karat.detect import objects
from karat.detect.coco import CocoPart, read_coco
from karat.detect.compare import compare_runs
from karat.detect.data import load_data, open_parts
from karat.detect.detector import build_detector
from karat.detect.evaluate import average_precision, kinds_of
from karat.detect.init import load_init
from karat.detect.measure import categories_of, evaluate_run
from karat.detect.task import train
from karat.runs.files import read_tensors
from support.detection import annotation, tiny, write_coco

WIDTH, HEIGHT = 60, 40
Plain = dict[str, Any]


def plain_of(path: Path) -> Plain:
    found: Plain = json.loads(path.read_text())
    return found


def read(folder: Path, edit: Callable[[Plain], object] = lambda plain: None) -> CocoPart:
    """A file of six images after an edit."""
    path = write_coco(folder)
    plain = plain_of(path)
    edit(plain)
    path.write_text(json.dumps(plain))
    return read_coco(path, [folder, folder / "images"])


def boxed(box: Any, **more: Any) -> Callable[[Plain], object]:
    """Annotation 1 with this box, and no mask."""

    def edit(plain: Plain) -> None:
        plain["annotations"][0].pop("segmentation")
        plain["annotations"][0].update(bbox=box, area=None, **more)

    return edit


# a box -> x1 y1 x2 y2 that is trained on (None: left out), the reason that is counted beside "without a mask"
BOXES: dict[str, tuple[list[float], tuple[float, ...] | None, str | None]] = {
    "inside": ([5, 6, 10, 12], (5, 6, 15, 18), None),
    "the image": ([0, 0, WIDTH, HEIGHT], (0, 0, WIDTH, HEIGHT), None),
    "rounded beyond": ([50.3, 30.3, 10.2, 10], (50.3, 30.3, 60, 40), None),
    "beyond the right": ([50, 6, 100, 12], (50, 6, 60, 18), objects.CLIPPED),
    "beyond left and top": ([-5, -6, 10, 12], (0, 0, 5, 6), objects.CLIPPED),
    "larger than the image": ([-500, -500, 1000, 1000], (0, 0, 60, 40), objects.CLIPPED),
    "small and inside": ([9, 9, 0.5, 0.4], (9, 9, 9.5, 9.4), None),
    "right of it": ([100, 10, 20, 20], None, objects.OUTSIDE),
    "above it": ([10, -30, 20, 20], None, objects.OUTSIDE),
    "nearly outside": ([59.2, 10, 20, 20], None, objects.OUTSIDE),
    "at its edge": ([60, 10, 20, 20], None, objects.OUTSIDE),
    "negative width": ([30, 10, -20, 20], None, objects.NO_AREA),
    "no height": ([30, 10, 20, 0], None, objects.NO_AREA),
    "nan": ([30, 10, float("nan"), 20], None, objects.NOT_FINITE),
    "infinite": ([30, 10, float("inf"), 20], None, objects.NOT_FINITE),
    "beyond all numbers": ([30, 10, 10**400, 20], None, objects.NOT_FINITE),
    "a share": ([0.2, 0.1, 0.5, 0.5], None, objects.SHARES),
}


@pytest.mark.parametrize("case", BOXES)
def test_boxes_are_clipped_or_left_out_and_counted_by_name(tmp_path: Path, case: str) -> None:
    box, used, reason = BOXES[case]
    part = read(tmp_path, boxed(box))
    things = part.pictures[1].things
    assert [thing.box for thing in things] == ([] if used is None else [pytest.approx(used)])
    expected = {reason: 1} if reason is not None else {}
    assert part.skipped == (expected if used is None else expected | {objects.NO_MASK: 1})
    assert all("annotation 1 of 1.png" in line for line in part.account.lines())
    if used is not None:
        assert things[0].area == pytest.approx((used[2] - used[0]) * (used[3] - used[1]))


def all_boxes(change: Callable[[list[float]], list[float]], masks: bool = False) -> Callable[[Plain], object]:
    def edit(plain: Plain) -> None:
        for one in plain["annotations"]:
            one["bbox"] = change(one["bbox"])
            if not masks:
                one.pop("segmentation")

    return edit


REFUSED: dict[str, tuple[Callable[[Plain], object], str]] = {
    "shares": (
        all_boxes(lambda b: [b[0] / WIDTH, b[1] / HEIGHT, b[2] / WIDTH, b[3] / HEIGHT]),
        r"its boxes are shares of the image, such as \[0\..*multiply x and width by the image's width",
    ),
    "corners": (
        lambda p: [a.update(bbox=[30, 15, 50, 35]) for a in p["annotations"]],
        r"its boxes are corners \[x1, y1, x2, y2\].*subtract",
    ),
    "text in a box": (boxed(["5", 6, 10, 12]), r"annotation 1 has the bbox \['5', 6"),
    "a boolean in a box": (boxed([True, 6, 10, 12]), r"annotation 1 has the bbox \[True"),
    "three numbers": (boxed([5, 6, 10]), r"annotation 1 has the bbox \[5, 6, 10\]; give \[x, y, width, height\]"),
    "no image_id": (lambda p: p["annotations"][0].pop("image_id"), "annotation 1 has the image_id None"),
    "no category_id": (lambda p: p["annotations"][0].pop("category_id"), "annotation 1 has the category_id None"),
    "an enormous id": (lambda p: p["images"][0].update(id=10**400), "has the id 1000"),
    "no file_name": (lambda p: p["images"][1].pop("file_name"), "image 1 has the file_name None"),
    "no width": (lambda p: p["images"][1].pop("width"), "image 1 has height 40 and width None"),
    "images absent": (
        lambda p: [image.update(file_name=f"gone/{image['id']}x.png") for image in p["images"]],
        r"'gone/0x\.png' is missing, and 5 more \('gone/1x\.png', 'gone/2x\.png', …\).*--images",
    ),
    "one file twice": (lambda p: p["images"][2].update(file_name="./1.png"), "images 1 and 2 are the same file"),
    "a category without a name": (lambda p: p["categories"][0].update(name=None), "has the name None; give text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    edit, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as said:
        read(tmp_path, edit)
    assert "\n" not in str(said.value)


def test_json_of_another_encoding_is_read_and_a_deep_one_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    text, expected = path.read_text(), read_coco(path, [tmp_path]).as_coco()
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert read_coco(path, [tmp_path]).as_coco() == expected
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_coco(path, [tmp_path])


@pytest.mark.parametrize("name", ["sub/1.png", "sub\\1.png", "C:\\data\\sub\\1.png", "/elsewhere/1.png"])
def test_names_with_folders_and_other_systems_strokes_are_found(tmp_path: Path, name: str) -> None:
    part = read(tmp_path, lambda p: p["images"][1].update(file_name=name))
    assert part.pictures[1].path.name == "1.png"
    if name.startswith("sub"):  # where the folder is there, its file is meant
        (tmp_path / "sub").mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "sub" / "1.png")
        assert read(tmp_path, lambda p: p["images"][1].update(file_name=name)).pictures[1].path.parent.name == "sub"


@pytest.mark.parametrize("area", [0, 0.02, None, 1e6], ids=str)
@pytest.mark.parametrize("mask", [True, False])
def test_areas_that_cannot_be_are_computed_from_mask_or_box(tmp_path: Path, area: float | None, mask: bool) -> None:
    def edit(plain: Plain) -> None:
        plain["annotations"][0].update(bbox=[10, 5, 20, 20], segmentation=[[10, 5, 30, 5, 10, 25]], area=area)
        if not mask:
            plain["annotations"][0].pop("segmentation")

    part = read(tmp_path, edit)
    assert part.pictures[1].things[0].area == pytest.approx(200 if mask else 400, rel=0.06)
    assert part.skipped[objects.WRONG_AREA] == (area is not None)


def test_a_right_area_stays(tmp_path: Path) -> None:
    part = read(tmp_path, lambda p: p["annotations"][0].update(bbox=[10, 5, 20, 20], area=37.5, segmentation=[]))
    assert part.pictures[1].things[0].area == 37.5


MASKS: dict[str, Any] = {
    "elsewhere": [[40, 30, 50, 30, 50, 38]],
    "shares": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.6]],
    "empty run lengths": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "a point": [[10, 10, 10, 10, 10, 10]],
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_nothing_or_of_another_place_are_left_out(tmp_path: Path, case: str) -> None:
    part = read(tmp_path, lambda p: p["annotations"][0].update(bbox=[8, 8, 10, 10], area=50, segmentation=MASKS[case]))
    assert not part.pictures[1].things
    assert part.skipped == {objects.MASK_ELSEWHERE: 1}


def test_annotations_that_are_there_twice_count_once_and_ids_do_not_matter(tmp_path: Path) -> None:
    def edit(plain: Plain) -> None:
        first = plain["annotations"][0]
        plain["annotations"] += [dict(first), {**first, "id": 700}, {**first, "bbox": [1, 1, 30, 30]}]

    part = read(tmp_path, edit)
    assert part.skipped[objects.TWICE] == 2
    assert len(part.pictures[1].things) == 2


def test_whole_numbers_with_a_point_and_a_null_crowd_are_read(tmp_path: Path) -> None:
    def edit(plain: Plain) -> None:
        plain["annotations"][0].update(image_id=1.0, category_id=9.0, iscrowd=None)
        plain["images"][0].update(width=float(WIDTH))

    assert read(tmp_path, edit).as_coco() == read(tmp_path / "plain").as_coco()


def box_only(folder: Path) -> Path:
    path = write_coco(folder)
    plain = plain_of(path)
    plain["annotations"] = [
        {k: v for k, v in a.items() if k != "segmentation"} for a in plain["annotations"] if not a["iscrowd"]
    ]
    path.write_text(json.dumps(plain))
    return path


def test_masks_that_there_are_not_have_no_figures_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = box_only(tmp_path / "data"), tmp_path / "run"
    summary = train(tiny(data, run, epochs=1, eval_train=True, track=("tensorboard",)), console=Console(width=200))
    said = capsys.readouterr().out
    assert "objects without a mask: trained on with their boxes for masks, and left out of mask AP" in said
    result = evaluate_run(run)
    rows = compare_runs([run], tmp_path / "compare")
    written = [(run / name).read_text() for name in (runs.METRICS, runs.SUMMARY, runs.EVAL)]
    assert "mask_AP" not in "".join([said, repr(summary), repr(result), repr(rows), *written])
    assert "box_AP" in written[0]
    assert cli.main(["detect", "eval", str(run)]) == 0
    said = capsys.readouterr().out
    assert "boxes alone are measured" in said
    assert "mask " not in said.replace("no masks", "")


def test_objects_without_a_mask_among_others_are_left_out_of_mask_ap() -> None:
    """What is found at their place counts neither way."""
    boxes = [[5.0, 5.0, 20.0, 20.0], [50.0, 50.0, 30.0, 30.0]]
    truth: Plain = {
        "images": [{"id": 1, "height": 100, "width": 100, "file_name": "1.png"}],
        "annotations": [annotation(i, 1, 1, box) for i, box in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "a"}],
    }
    truth["annotations"][1].pop("segmentation")
    found = [
        {"image_id": 1, "category_id": 1, "score": 0.9 - 0.1 * i, "bbox": box, "segmentation": annotation(1, 1, 1, box)}
        for i, box in enumerate(reversed(boxes))
    ]
    for one in found:
        one["segmentation"] = {"size": [100, 100], "counts": one_mask(one["bbox"])}  # type: ignore[arg-type]
    figures = average_precision(truth, found)
    assert figures["box_AP"] == pytest.approx(100)
    assert figures["mask_AP"] == pytest.approx(100)
    assert average_precision(truth, found[1:])["box_AP"] == pytest.approx(50.5, abs=1)
    assert average_precision(truth, found[1:])["mask_AP"] == pytest.approx(100)
    truth["annotations"][0].pop("segmentation")
    assert kinds_of(truth) == ("box",)
    assert "mask_AP" not in average_precision(truth, found)


def one_mask(box: list[float]) -> str:
    import numpy as np
    from pycocotools import mask as api

    x, y, w, h = map(int, box)
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    counts: str = api.encode(np.asfortranarray(mask))["counts"].decode()
    return counts


def test_images_without_objects_are_negatives_that_are_trained_on(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    plain = plain_of(path)
    plain["annotations"] = plain["annotations"][:1]
    path.write_text(json.dumps(plain))
    data = load_data(tiny(tmp_path, batch_size=4, repeat=1))
    (images, targets), = list(data.train)  # fmt: skip
    assert sorted(len(target["boxes"]) for target in targets) == [0, 0, 0, 1]
    assert all(target["masks"].shape[1:] == image.shape[1:] for image, target in zip(images, targets, strict=True))
    assert all(target["labels"].dtype == torch.int64 for target in targets)


def renamed(path: Path, names: dict[int, str], offset: int = 0) -> Path:
    """The file with other names, and other numbers, for its categories 3 and 9."""
    plain = plain_of(path)
    for one in plain["categories"]:
        one.update(name=names.get(one["id"], one["name"]), id=one["id"] + offset)
    for one in plain["annotations"]:
        one["category_id"] += offset
    path.write_text(json.dumps(plain))
    return path


def test_categories_of_an_evaluation_file_follow_their_names(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "a")
    other = renamed(write_coco(tmp_path / "b"), {3: "nut", 9: "fig"}, offset=5)  # exchanged, and other numbers
    train_part, found = open_parts(tiny(data, eval_data=str(other), eval_images=None))
    assert found.categories == train_part.categories == {3: "fig", 9: "nut"}
    for mine, theirs in zip(train_part.pictures, found.pictures, strict=True):
        assert [3 - thing.label for thing in mine.things] == [thing.label for thing in theirs.things]
    renamed(other, {8: "owl"})
    with pytest.raises(ValueError, match="has the class 'owl', which training lacks"):
        open_parts(tiny(data, eval_data=str(other), eval_images=None))


def test_a_run_does_not_go_on_under_exchanged_categories(tmp_path: Path) -> None:
    data, run = write_coco(tmp_path / "data"), tmp_path / "run"
    settings = tiny(data, run, epochs=1, resume="auto")
    train(settings)
    renamed(data, {3: "nut", 9: "fig"})
    with pytest.raises(ValueError, match=r"classes have changed .nut, fig in another order"):
        train(settings)


def test_evaluation_images_without_objects_measure_no_masks_where_there_are_none(tmp_path: Path) -> None:
    data = box_only(tmp_path / "data")
    plain = plain_of(data)
    plain["annotations"] = [one for one in plain["annotations"] if one["image_id"] < 4]
    data.write_text(json.dumps(plain))
    assert "mask_AP" not in train(tiny(data, tmp_path / "run", epochs=1))
    plain["annotations"].clear()
    (tmp_path / "data" / "other.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"other\.json: there are no objects, without which average precision"):
        evaluate_run(tmp_path / "run", data=str(tmp_path / "data" / "other.json"))


@pytest.mark.parametrize("value", [None, 3, "x", [], [1], [{"id": 3}], [{"id": "3", "name": "a"}], {"id": 3}], ids=str)
def test_categories_of_a_config_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"config\.json has the categories .*; a list of id and name"):
        categories_of({"categories": value}, Path("run"))


@pytest.mark.parametrize(("names", "same"), [({}, True), ({3: "nut", 9: "fig"}, False), ({9: "owl"}, False)])
def test_last_layers_go_over_where_their_categories_do(tmp_path: Path, names: dict[int, str], same: bool) -> None:
    data = write_coco(tmp_path / "data")
    train(tiny(data, tmp_path / "run", epochs=1))
    settings = tiny(renamed(data, names), init=str(tmp_path / "run"))
    detector = build_detector(settings, 2)
    fates = load_init(detector, settings, list(read_coco(data, [data.parent]).categories.values()))
    theirs, mine = read_tensors(tmp_path / "run" / "model.safetensors"), detector.state_dict()
    for name in ("box_predictor.cls_score.weight", "mask_predictor.mask_fcn_logits.weight"):
        assert torch.equal(mine[f"roi_heads.{name}"], theirs[f"roi_heads.{name}"]) == same
    assert any("has the classes fig, nut, the data" in fate.why for fate in fates) != same


def test_a_detector_of_numbers_that_are_not_finite_begins_no_run(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data")
    train(tiny(data, tmp_path / "run", epochs=1))
    weights = read_tensors(tmp_path / "run" / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm1.bias"))
    runs.write_weights(tmp_path / "run", weights | {name: weights[name] * float("nan")})
    settings = tiny(data, init=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=rf"--init .*{name}' has numbers that aren't finite"):
        load_init(build_detector(settings, 2), settings)
