"""Tiny detectors and COCO files for the tests of detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from karat.detect.settings import DetectSettings

# a ViT of two blocks on 32² pixels: windows of 2x2 tokens, the second block sees all 4x4
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "recipe": "small",
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "window": 2,
    "global_blocks": (1,),
    "channels": 8,
    "head_width": 16,
    "mask_convs": 1,
    "rois": 8,
    "rpn_anchors": 16,
    "pre_nms": (50, 50),
    "post_nms": (20, 20),
    "batch_size": 2,
    "repeat": 2,
    "epochs": 2,
    "eval_images": 2,
    "track": (),
    "device": "cpu",
}


def tiny(data: Path, output: Path | None = None, **values: Any) -> DetectSettings:
    """Settings of a run that takes a second or two."""
    return DetectSettings.make(**{**TINY, "data": str(data), "output": output, **values})


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    """An annotation whose polygon is its box."""
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": outline,
        **more,
    }


def write_coco(folder: Path, count: int = 6, size: tuple[int, int] = (40, 60)) -> Path:
    """A JSON with images beside it: two categories with a gap in their ids, polygons, run lengths, a crowd, an image
    without objects (the first one)."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(count):
        pixels = draw.integers(0, 80, (height, width, 3), dtype=np.uint8)
        if number:
            x, y = int(draw.integers(0, width // 2)), int(draw.integers(0, height // 2))
            w, h = width // 3, height // 3
            pixels[y : y + h, x : x + w] = (250, 30 * number, 20)
            more: dict[str, Any] = {}
            if number == 2:
                mask = np.zeros((height, width), dtype=np.uint8)
                mask[y : y + h, x : x + w] = 1
                more = {"segmentation": {"size": [height, width], "counts": run_lengths(mask)}}
            box = [float(x), float(y), float(w), float(h)]
            annotations.append(annotation(len(annotations) + 1, number, (3, 9)[number % 2], box, **more))
        if number == 3:
            crowd = np.zeros((height, width), dtype=np.uint8)
            crowd[-8:, -12:] = 1
            counts = {"size": [height, width], "counts": run_lengths(crowd)}
            box = [width - 12.0, height - 8.0, 12.0, 8.0]
            annotations.append(annotation(99, number, 3, box, iscrowd=1, segmentation=counts))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    path = folder / "instances.json"
    names = [{"id": 9, "name": "nut"}, {"id": 3, "name": "fig"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))
    return path


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()
