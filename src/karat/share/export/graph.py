"""A model traced into a graph of ordinary PyTorch operators, for any batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from karat.models.evaluating import computed_by, evaluating

BATCHES = (1, 3)  # what an exported file is tried with: neither is the batch that it was traced with
TRACED = 2
MOST_IMAGES = 1 << 16
TOLERANCE = 1e-4


def plain_path(model: nn.Module) -> AbstractContextManager[None]:
    """Within, every operator of the model computes by the definition of basis attention (impl="reference"): ordinary
    PyTorch operators that an exporter can translate, in place of karat's own kernels."""
    return computed_by(model, "reference")


def exported_program(model: nn.Module, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The graph of a model in evaluation mode, images (B,C,H,W) -> logits, for every B from 1 to 65,536.

    shape: (C,H,W), which is fixed. Raises ValueError for a model that can't be traced, with the tracer's reason.
    """
    first = next(model.parameters())
    images = torch.zeros(TRACED, *shape, dtype=first.dtype, device=first.device)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with evaluating(model), plain_path(model), torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # the tracer's own exceptions share no base but this
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{type(model).__name__} can't be exported: {type(error).__name__}: {reason}") from error


@torch.no_grad()
def largest_difference(
    model: nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int], tolerance: float
) -> float:
    """The largest |difference| of logits between `run` and the model on random images, over batches of 1 and 3.

    In units of the largest logit where that is above 1. Raises ValueError where it is above the tolerance, or where
    a batch gives logits of another shape.
    """
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with evaluating(model):
        for batch in BATCHES:
            images = torch.randn(batch, *shape, generator=generator).to(first)
            expected = model(images).float().cpu()
            found = run(images).float().cpu()
            if found.shape != expected.shape:
                raise ValueError(f"a batch of {batch} gives {tuple(found.shape)} instead of {tuple(expected.shape)}")
            difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
            worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    if worst > tolerance:
        raise ValueError(f"the exported model's logits differ from PyTorch's by {worst:.2g}, more than {tolerance:g}")
    return worst


def as_text(metadata: Mapping[str, object] | None) -> dict[str, str]:
    """Metadata as strings: JSON where a value is none."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in (metadata or {}).items()}
