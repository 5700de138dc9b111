"""One training step of a detector: its peak memory and its time.

    python benchmarks/detect_step.py --model vit_base_patch16_224 --attention g1b --img-size 1024

The image has random pixels and fills 3/4 of the square, so that a quarter is masked padding; 20 objects are in it.
Proposals and heads are the published ones (2,000 proposals, 512 regions). The step is AdamW's, its moments included.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from karat.detect.detector import build_detector
from karat.detect.settings import DetectSettings
from karat.detect.task import total_loss
from karat.train.optim import create_optimizer


@dataclass
class Options:
    """Measure one training step of a detector."""

    model: str = "vit_base_patch16_224"
    """timm's name of a ViT."""
    attention: str = "g1b"
    """Attention of the trunk."""
    img_size: int = 1024
    """Side of the image in pixels."""
    steps: int = 1
    """Steps; the time is the last one's."""


def targets(height: int, width: int, count: int = 20) -> dict[str, Tensor]:
    """Boxes of 32 to 288 pixels, filled."""
    corners = torch.rand(count, 2) * torch.tensor([width - 300.0, height - 300.0])
    boxes = torch.cat([corners, corners + 32 + 256 * torch.rand(count, 2)], 1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.randint(1, 81, (count,)), "masks": masks}


def main(options: Options) -> None:
    """Print one line of JSON."""
    torch.manual_seed(0)
    light = {"rel_pos": False, "rpn_convs": 1, "box_convs": 0, "head_norm": False}  # as the page's figures are
    settings = DetectSettings.make(
        model=options.model,
        attention=options.attention,
        recipe="jitter",
        img_size=options.img_size,
        layer_decay=None,
        **light,
    )
    detector = build_detector(settings, 80)
    optimizer = create_optimizer(detector, settings.recipe, 1)
    height, width = options.img_size * 3 // 4, options.img_size
    for _ in range(options.steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = total_loss(detector, ([torch.rand(3, height, width)], [targets(height, width)]))
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - began
    found = {
        "model": options.model,
        "attention": options.attention,
        "img_size": options.img_size,
        "global_tokens": (options.img_size // detector.trunk.stride) ** 2,
        "parameters": sum(p.numel() for p in detector.parameters()),
        "loss": round(loss.item(), 4),
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Options))
