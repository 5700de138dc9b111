"""Average precision of boxes and masks as COCO defines it, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_api
from torch import Tensor

from karat.detect.coco import CocoPart
from karat.detect.detector import Detector
from karat.detect.objects import NO_MASK, outline_of
from karat.models.evaluating import evaluating
from karat.train.task import Batch

# COCO's summary: figure -> its place in `stats`
FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
KINDS = {"box": "bbox", "mask": "segm"}
MASK_THRESHOLD = 0.5


def average_precision(
    coco: dict[str, Any], results: Sequence[dict[str, Any]], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """{box_AP, box_AP50, box_AP75, box_APs, box_APm, box_APl, mask_AP, ...} in percent.

    Where no object has a mask (a segmentation) there are figures of boxes alone; where some have none, the masks'
    figures are of the others: what is found at the places of these counts neither way, as in a crowd.

    AP is the mean over the categories and the overlaps 0.50:0.05:0.95 with at most 100 detections an image; s, m and l
    are objects of less than 32², up to 96², and more pixels of area. A figure without any object to find is left out,
    but AP, which is 0 then.

    Args:
        coco: annotations as COCO's JSON has them (images, annotations, categories), ids from 1.
        results: detections as COCO has them: image_id, category_id, score, bbox [x, y, w, h], segmentation (RLE).
    """
    figures: dict[str, float] = {}
    for kind in kinds or kinds_of(coco):
        # a mask's size is its own area, so its box must not be there to give another
        kept = [{k: v for k, v in r.items() if k != ("segmentation" if kind == "box" else "bbox")} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(coco if kind == "box" else _with_masks(coco), use_deepcopy=True)
            measured = COCOeval_faster(truth, truth.loadRes(kept), KINDS[kind], print_function=lambda *_: None)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        for name, place in FIGURES.items():
            value = float(measured.stats[place])
            if value >= 0:  # -1 stands for no object to find
                figures[f"{kind}_{name}"] = 100 * value
        figures.setdefault(f"{kind}_AP", 0.0)
    return figures


def kinds_of(coco: dict[str, Any]) -> Sequence[str]:
    """What can be measured: boxes, and masks unless there are objects and none of them has one."""
    objects = [entry for entry in coco["annotations"] if not entry["iscrowd"]]
    return ("box",) if objects and not any("segmentation" in entry for entry in objects) else ("box", "mask")


def _with_masks(coco: dict[str, Any]) -> dict[str, Any]:
    """The annotations, those without a mask as crowds of their box."""
    filled = []
    for entry in coco["annotations"]:
        if "segmentation" not in entry:
            x, y, w, h = entry["bbox"]
            outline = outline_of((x, y, x + w, y + h)).ravel().tolist()
            entry = entry | {"iscrowd": 1, "segmentation": [outline]}
        filled.append(entry)
    return coco | {"annotations": filled}


def as_results(
    found: dict[str, Tensor], image_id: int, category_ids: Sequence[int], masks: bool = True
) -> list[dict[str, Any]]:
    """A detector's output for one image as COCO's detections; boxes rounded to 1/100 of a pixel as COCO's are."""
    boxes = found["boxes"].float().cpu()
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).numpy().round(2).tolist()
    labels, scores = found["labels"].tolist(), found["scores"].float().tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, "bbox": box}
        for label, score, box in zip(labels, scores, corners, strict=True)
    ]
    if masks:
        for result, mask in zip(results, found["masks"][:, 0].cpu(), strict=True):
            shape = rle_api.encode(np.asfortranarray((mask > MASK_THRESHOLD).numpy().astype(np.uint8)))
            counts = shape["counts"]
            result["segmentation"] = {
                "size": list(shape["size"]),
                "counts": counts.decode() if isinstance(counts, bytes) else counts,
            }
    return results


@torch.no_grad()
def detect(
    model: Detector,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    category_ids: Sequence[int],
) -> tuple[list[dict[str, Any]], list[int]]:
    """All detections of this process's batches, in the files' pixels, and the ids of the images; the mode stays."""
    results: list[dict[str, Any]] = []
    seen: list[int] = []
    with evaluating(model):
        for images, targets in batches:
            moved = [image.to(accelerator.device, non_blocking=True) for image in images]
            sizes = [(int(t["size"][0]), int(t["size"][1])) for t in targets]
            with accelerator.autocast():
                outputs = model(moved, sizes=sizes)
            for output, target in zip(outputs, targets, strict=True):
                if "image_id" not in target:  # padding, which keeps processes in step
                    continue
                seen.append(int(target["image_id"]))
                results += as_results(output, seen[-1], category_ids)
    return results, seen


def measure(
    model: Detector,
    batches: Iterable[Batch],
    part: CocoPart,
    accelerator: Accelerator,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The part's average precisions and number of images, and all detections, the same on every process.

    Images that could not be decoded count for nothing. ValueError when none could.
    """
    results, seen = detect(model, batches, accelerator, list(part.categories))
    gathered = gather_object([(results, seen)]) if accelerator.num_processes > 1 else [(results, seen)]
    everything = [result for some, _ in gathered for result in some]
    everything.sort(key=lambda result: result["image_id"])  # whatever the number of processes
    figures: list[Any] = [None]
    if accelerator.is_main_process:
        ids = {number for _, some in gathered for number in some}
        if ids:
            kept = part.part([index for index, picture in enumerate(part.pictures) if picture.id in ids])
            box_only = part.skipped[NO_MASK] and not any(t.has_mask for p in part.pictures for t in p.things)
            precision = average_precision(kept.as_coco(), everything, ("box",) if box_only else None)
            figures = [{**precision, "images": len(ids)}]
    if accelerator.num_processes > 1:
        broadcast_object_list(figures)
    if figures[0] is None:
        raise ValueError(f"{part.source}: no image to evaluate on")
    return figures[0], everything
