"""Counting what a model costs: its numbers and its operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from karat.models.evaluating import evaluating
from karat.models.transfer import look, teacher_of
from karat.operator.operator import karat_operators


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters, shared ones once, those without gradient too."""
    return sum(parameter.numel() for parameter in module.parameters())


def operator_parameters(model: nn.Module) -> int:
    """Numbers that the learnable attention adds to the model, a universal operator once."""
    return sum(count_parameters(operator) for operator in karat_operators(model).values())


class _Look(nn.Module):
    """What a student's forward pass does to its teacher: the teacher's own, and reading its attention."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> None:
        look(self.teacher, images)


def teacher_multiply_adds(model: nn.Module, images: Tensor) -> int:
    """How many of a model's multiply-adds (as `multiply_adds`) its frozen teacher does; 0 without one."""
    teacher = teacher_of(model)
    return 0 if teacher is None else multiply_adds(_Look(teacher), images)


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass of `images` (B,C,height,width), as run here: matrix products alone.

    Counted by torch's FLOP counter and halved. Elementwise work (softmax, cos, sin, GELU) is not in it. Fused softmax
    attention is unfused while counting, for the counter knows no formula of the CPU's.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() // 2
