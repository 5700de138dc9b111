"""A whole training step of a vision transformer, and its peak memory, against softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from karat.models.create import create_model
from karat.operator.operator import karat_operators
from karat.study.bench import paper_way
from karat.study.bench.timing import Timing, alternate

# The pairs that the targets speak of: model, learnable attention.
PAIRS = {
    "tiny": ("vit_tiny_patch16_224", "g3b"),
    "small": ("vit_small_patch16_224", "g3b"),
    "base": ("vit_base_patch16_224", "g1b"),
    "tiny-residual": ("vit_tiny_patch16_224", "g3b,residual=softmax"),
    "small-residual": ("vit_small_patch16_224", "g3b,residual=softmax"),
    "tiny-recommended": ("vit_tiny_patch16_224", "recommended"),
}
SOFTMAX_WAYS = ("softmax eager", "softmax SDPA")


def build(name: str, way: str, attention: str, **kwargs: Any) -> nn.Module:
    """The model with one way of computing attention: softmax eager, softmax SDPA, paper's way, karat."""
    torch.manual_seed(0)
    if way in SOFTMAX_WAYS:
        model: nn.Module = timm.create_model(name, num_classes=10, **kwargs)
        fuse_softmax(model, way == "softmax SDPA")
        return model
    model = create_model(name, attention=attention, num_classes=10, **kwargs)
    if way == "paper's way":
        operator: Any  # whose method is replaced
        for operator in karat_operators(model).values():
            operator.attend = paper_way.attend.__get__(operator)
    return model


def fuse_softmax(model: nn.Module, fused: bool) -> bool:
    """Let timm's softmax attention call PyTorch's fused kernel, or three plain operations; whether there is any."""
    switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
    module: Any  # timm's, with a switch
    for module in switched:
        module.fused_attn = fused
    return bool(switched)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a timm model's patch embedding takes."""
    embedding: Any = model.patch_embed
    height, width = embedding.img_size
    return height, width


def step_of(
    model: nn.Module,
    batch: int,
    *,
    device: str = "cpu",
    amp: torch.dtype | None = None,
    side: int | None = None,
    channels: int = 3,
    batches: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Callable[[], float]:
    """A closure that does one AdamW step on a fixed random batch and returns the loss.

    The images are square, `side` pixels a side; None asks the model's patch embedding. Each step adds up the gradients
    of `batches` passes.
    """
    model = model.to(device).train()
    size = (side, side) if side is not None else image_size(model)
    images = torch.randn(batch, channels, *size, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(batches):
            with torch.autocast(device, dtype=amp, enabled=amp is not None):
                loss = F.cross_entropy(model(images), labels)
            (loss / batches).backward()
        optimizer.step()
        return loss.item()

    return step


def measure(
    name: str,
    attention: str,
    *,
    batch: int = 16,
    rounds: int = 9,
    device: str = "cpu",
    amp: torch.dtype | None = None,
    materialised: bool = False,
    model_options: Mapping[str, object] | None = None,
) -> dict[str, Timing]:
    """Seconds of a training step, each way, in one alternating run; `model_options` are timm's."""
    ways = [*SOFTMAX_WAYS, "karat", *(["paper's way"] if materialised else [])]
    steps = {
        way: step_of(build(name, way, attention, **(model_options or {})), batch, device=device, amp=amp)
        for way in ways
    }
    return alternate(steps, rounds)
