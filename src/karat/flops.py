"""Counting a model's operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass of `images` (B,C,height,width), as run here: matrix products alone.

    Counted by torch's FLOP counter and halved. Elementwise work (softmax, cos, sin, GELU) is not in it. Fused softmax
    attention is unfused while counting, for the counter knows no formula of the CPU's.
    """
    training = model.training
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(images)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
