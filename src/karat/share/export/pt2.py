"""torch.export: a .pt2 file that `torch.export.load` runs, without karat or timm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from karat.runs.files import draft_of
from karat.share.export.graph import TOLERANCE, as_text, exported_program, largest_difference

METADATA = "karat.json"


def export_pt2(
    model: nn.Module,
    path: str | Path,
    shape: tuple[int, int, int],
    *,
    metadata: Mapping[str, object] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Write a model as a .pt2 file, and read it back to be tried with one image and with three.

    Args:
        model: images (B,C,H,W) -> logits (B,classes). shape: (C,H,W).
        metadata: plain values kept in the file under the name karat.json (`extra_files` of `torch.export.load`).
        tolerance: how far the logits may be from PyTorch's, see `largest_difference`.

    Returns:
        How far they are.

    Raises:
        ValueError: a model that can't be traced, or logits that differ by more; nothing is left at `path` then.
    """
    program = exported_program(model, shape)
    with draft_of(Path(path)) as draft:
        torch.export.save(program, draft, extra_files={METADATA: json.dumps(as_text(metadata))})
        again = torch.export.load(draft).module()

        def run(images: Tensor) -> Tensor:
            logits: Tensor = again(images)
            return logits

        return largest_difference(model, run, shape, tolerance)
