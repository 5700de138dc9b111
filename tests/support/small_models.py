"""One small model of each backbone, and of each way to have prefix tokens, for the tests of conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import karat

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}

# name -> (timm's name, its arguments, tokens that reach the last attention, attention modules that can be converted)
SMALL: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 17, 2),
    "vit_no_prefix": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, 16, 2),
    "vit_registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 4, "no_embed_class": True}, 21, 2),
    "vit_norms": (
        "vit_tiny_patch16_224",
        {**VIT, "qk_norm": True, "scale_attn_norm": True, "qkv_bias": False, "global_pool": "map"},
        17,
        2,
    ),
    "deit": ("deit_tiny_patch16_224", VIT, 17, 2),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT, 18, 2),
    "convit": (
        "convit_tiny",
        {"img_size": 16, "patch_size": 4, "embed_dim": 6, "depth": 4, "local_up_to_layer": 2},
        17,
        2,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 12,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "drop_path_rate": 0.0,
        },
        16,
        4,
    ),
}

BACKBONES = ("vit", "convit", "swin")


def small_model(name: str, attention: str = "softmax", num_classes: int = 4, **kwargs: Any) -> nn.Module:
    """A fresh small model."""
    timm_name, arguments, _, _ = SMALL[name]
    return karat.create_model(timm_name, attention, num_classes=num_classes, **{**arguments, **kwargs})


def images(model_name: str, batch: int = 2) -> torch.Tensor:
    """Random images of the size that the small model takes."""
    side = SMALL[model_name][1]["img_size"]
    return torch.randn(batch, 3, side, side)
