"""Folders of small images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def images(root: Path, count: int = 24) -> Path:
    """A folder of two classes of small images."""
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        kind = root / "train" / f"class{index % 2}"
        kind.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(kind / f"{index}.png")
    return root
