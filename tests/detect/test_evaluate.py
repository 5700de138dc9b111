"""The evaluator's figures against pycocotools', the definition."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from karat.detect.evaluate import FIGURES, KINDS, average_precision
from support.detection import annotation, run_lengths

# pycocotools itself, under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def scene(
    seed: int, images: int = 12, classes: tuple[int, ...] = (2, 5, 11)
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random objects of all sizes, crowds among them, some images without any; detections near some and elsewhere."""
    draw = np.random.default_rng(seed)
    side = 200
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(0 if image % 4 == 0 else draw.integers(1, 8)):
            w, h = draw.integers(6, 120, 2)
            x, y = draw.integers(0, side - w), draw.integers(0, side - h)
            box = [float(v) for v in (x, y, w, h)]
            category, more = int(draw.choice(classes)), {}
            if draw.random() < 0.25:
                mask = np.zeros((side, side), dtype=np.uint8)
                mask[y : y + h, x : x + w] = 1
                more = {"iscrowd": 1, "segmentation": {"size": [side, side], "counts": run_lengths(mask)}}
            annotations.append(annotation(len(annotations) + 1, image, category, box, **more))
            for _ in range(draw.integers(0, 3)):
                shift = draw.normal(0, 4, 4).round(2)
                moved = [float(v) for v in np.array(box) + shift]
                moved[2:] = [max(v, 2.0) for v in moved[2:]]
                results.append(detection(image, category, moved, float(draw.random()), side))
        for _ in range(draw.integers(0, 3)):
            box = [float(v) for v in draw.integers(1, 90, 4)]
            results.append(detection(image, int(draw.choice(classes)), box, float(draw.random()), side))
    pictures = [{"id": n, "height": side, "width": side, "file_name": f"{n}.png"} for n in range(1, images + 1)]
    names = [{"id": n, "name": str(n)} for n in classes]
    return {"images": pictures, "annotations": annotations, "categories": names}, results


def detection(image: int, category: int, box: list[float], score: float, side: int) -> dict[str, Any]:
    x, y, w, h = (int(v) for v in box)
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    return {
        "image_id": image,
        "category_id": category,
        "score": score,
        "bbox": box,
        "segmentation": encoded(mask),
    }


def encoded(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as api

    packed = api.encode(np.asfortranarray(mask))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def by_pycocotools(coco: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    drop = "segmentation" if kind == "box" else "bbox"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
        kept = [{k: v for k, v in r.items() if k != drop} for r in results]
        measured = COCOeval(truth, truth.loadRes(kept), KINDS[kind])
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return {f"{kind}_{name}": 100 * measured.stats[place] for name, place in FIGURES.items()}


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(seed: int) -> None:
    coco, results = scene(seed)
    ours = average_precision(coco, results)
    for kind in KINDS:
        for name, value in by_pycocotools(coco, results, kind).items():
            assert ours.get(name, -100.0) == pytest.approx(value, abs=1e-6), name
    assert 1 < ours["box_AP"] < 99


def test_exact_detections_of_all_objects_score_100() -> None:
    coco, _ = scene(7)
    results = [
        detection(a["image_id"], a["category_id"], a["bbox"], 0.9, 200) for a in coco["annotations"] if not a["iscrowd"]
    ]
    figures = average_precision(coco, results)
    assert figures["box_AP"] == pytest.approx(100)
    assert figures["mask_AP"] == pytest.approx(100)


def test_no_detections_and_no_objects() -> None:
    coco, results = scene(0)
    assert average_precision(coco, [])["box_AP"] == 0
    empty = {**coco, "annotations": []}
    figures = average_precision(empty, results)
    assert figures == {"box_AP": 0.0, "mask_AP": 0.0}


def test_a_size_without_objects_has_no_figure() -> None:
    coco, _ = scene(0, images=1)
    coco["annotations"] = [annotation(1, 1, 2, [0.0, 0.0, 120.0, 120.0])]
    figures = average_precision(coco, [detection(1, 2, [0.0, 0.0, 120.0, 120.0], 0.5, 200)])
    assert "box_APs" not in figures
    assert figures["box_APl"] == pytest.approx(100)
