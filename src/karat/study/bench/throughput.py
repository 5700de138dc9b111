"""Images a second of a whole model in inference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from karat.study.bench.step import SOFTMAX_WAYS, build, image_size
from karat.study.bench.timing import Timing, alternate


def _infer(model: nn.Module, images: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.inference_mode(), torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        return model(images)


def measure(
    name: str, attention: str, *, batch: int = 16, rounds: int = 9, device: str = "cpu", amp: torch.dtype | None = None
) -> dict[str, Timing]:
    """Seconds of one inference batch, softmax both ways and karat, in one alternating run."""
    models = {way: build(name, way, attention).to(device).eval() for way in (*SOFTMAX_WAYS, "karat")}
    images = torch.randn(batch, 3, *image_size(models["karat"]), device=device)
    return alternate({way: partial(_infer, model, images, amp) for way, model in models.items()}, rounds)
