"""Kinds of models that karat has no record of, as small as they come, and their attention computed apart from karat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from karat import KArAtOperator


@dataclass(frozen=True)
class Kind:
    """make: gives the model; side: of its images; operators: how many it gets; axis: of the heads among five."""

    make: Callable[[], nn.Module]
    side: int = 32
    operators: int = 2
    axis: int = 1

    def model_and_input(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return self.make().eval(), torch.randn(2, 3, self.side, self.side)


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=4, **arguments)


PLAIN: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,)}
PVT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
TWINS = {"img_size": 32, "depths": (2,), "embed_dims": (12,), "num_heads": (3,), "mlp_ratios": (1,), "wss": (2,)}
HIERA = {"img_size": (32, 32), "embed_dim": 12, "num_heads": 1, "stages": (1, 1), "mask_unit_size": (4, 4), "q_pool": 1}
CROSS: dict[str, Any] = {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "mlp_ratio": (1, 1, 1)}
CROSS |= {"embed_dim": (12, 24), "num_heads": (2, 2), "depth": ((1, 1, 0),)}
LEVIT = {"img_size": 32, "embed_dim": (24, 32), "key_dim": 8, "num_heads": (3, 4), "depth": (1, 1)}
OUTLOOK: dict[str, Any] = {"layers": (1, 1), "embed_dims": (24, 24), "num_heads": (3, 3), "mlp_ratio": 1.0}
OUTLOOK |= {"downsamples": (True, False), "outlook_attention": (True, False), "num_classes": 4, "stem_hidden_dim": 8}

KINDS: dict[str, Kind] = {
    "rotary": Kind(_timm("eva02_tiny_patch14_224", **{**PLAIN, "img_size": 28}), 28),
    "relative positions": Kind(_timm("vit_relpos_small_patch16_224", **PLAIN)),
    "two calls": Kind(_timm("vit_tiny_patch16_224", attn_layer="diff", **{**PLAIN, "num_heads": 2}), operators=4),
    "windows, written out": Kind(_timm("swinv2_tiny_window8_256", **SWIN)),
    "windows of torchvision": Kind(lambda: SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=4)),
    "multi-head": Kind(lambda: VisionTransformer(32, 8, 2, 2, 16, 32)),
    "pooled keys": Kind(_timm("pvt_v2_b0", **PVT), 64, operators=4),
    "five axes": Kind(_timm("twins_svt_small", sr_ratios=(2,), **TWINS), axis=2),
    "mask units": Kind(_timm("hiera_tiny_224", **HIERA)),
    "folded heads": Kind(_timm("samvit_base_patch16", global_attn_indexes=(1,), window_size=2, **PLAIN)),
    "talking heads": Kind(_timm("cait_xxs24_224", **{**PLAIN, "depth": 1}), operators=3),
    "two branches": Kind(_timm("crossvit_tiny_240", **CROSS), 48, operators=4),
    "convolutional queries": Kind(_timm("levit_128s", **LEVIT), operators=3),
    "outlook": Kind(lambda: VOLO(img_size=32, **OUTLOOK), operators=4),
    "any size": Kind(_timm("naflexvit_base_patch16_gap", **{k: v for k, v in PLAIN.items() if k != "img_size"})),
}


@contextmanager
def computed_apart(operators: list[KArAtOperator], axis: int) -> Iterator[list[Tensor]]:
    """While open, attention is σ v by the definition, the next operator's at each call; gives the σ, (B,H,M,N) each."""
    left, seen = iter(operators), list[Tensor]()

    def sigma(scores: Tensor, mask: Tensor | None = None) -> Tensor:
        operator, folded, at = next(left), scores.dim() == 3, axis if scores.dim() == 5 else 1
        where = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
        parts = [(x.unflatten(0, (-1, operator.num_heads)) if folded else x).movedim(at, -3) for x in (scores, where)]
        with plainly():
            seen.append(operator(*(x.flatten(0, -4) for x in parts)))
        return seen[-1].reshape(parts[0].shape).movedim(-3, at).reshape(scores.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *_: Any, scale: Any = None, **__: Any) -> Tensor:
        scores, mask = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale), None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask is not None:
            scores, mask = scores + attn_mask, attn_mask > -100
        return sigma(scores, mask) @ v

    def softmax(scores: Tensor, *_: Any, **__: Any) -> Tensor:
        return sigma(scores, scores > -50)  # those of small models at their start are near zero

    own = {place: place.softmax for place in (F, torch, Tensor)}
    with pytest.MonkeyPatch.context() as patch:

        def put(functions: dict[Any, Any]) -> None:
            for place, function in functions.items():
                patch.setattr(place, "softmax", function)

        @contextmanager
        def plainly() -> Iterator[None]:
            put(own)
            yield
            put(dict.fromkeys(own, softmax))

        patch.setattr(F, "scaled_dot_product_attention", attend)
        put(dict.fromkeys(own, softmax))
        yield seen
