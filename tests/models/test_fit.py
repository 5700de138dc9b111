"""Weights brought to another model's sizes: what karat.resample_tokens gives, and the conventions of timm's files."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import karat
from karat.models import backbones
from karat.models.backbones import backbone_of
from karat.models.fit import fit, places_of_weights
from karat.operator.token_grid import TokenGrid

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SIZES,
    "deit_tiny_distilled_patch16_224": SIZES,
    "deit3_small_patch16_224": SIZES,
    "vit_base_patch16_reg4_gap_256": SIZES,
    "vit_base_patch16_siglip_224": SIZES | {"global_pool": "avg"},
    "convit_tiny": {"embed_dim": 6, "depth": 3, "num_heads": 2, "local_up_to_layer": 1, "num_classes": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3},
}


def model(name: str, attention: str, side: int, **more: Any) -> nn.Module:
    made = karat.create_model(name, attention, img_size=side, **BACKBONES[name], **more).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_every_backbone_starts_from_another_size() -> None:
    found = [backbone_of(timm.create_model(name, **sizes)) for name, sizes in BACKBONES.items()]
    assert all(record in found for record in backbones.BACKBONES.values())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("attention", ["softmax,position_bias=relative", "g1b,rank=3", "dog-b,rank=3,residual=softmax"])
@pytest.mark.parametrize("name", BACKBONES)
def test_another_size_is_what_resampling_the_source_gives(name: str, attention: str, known: bool) -> None:
    attention = "softmax" if "relative" in attention and "swin" in name else attention
    window = {"window_size": 4} if "swin" in name else {}
    before, now = (56, 64) if window else (64, 96)
    source, target = model(name, attention, before), model(name, attention, now, **window)
    weights = {key: x.clone() for key, x in source.state_dict().items()}
    found, resized = fit(target, weights, source if known else None)
    expected = karat.resample_tokens(source, now, **window).state_dict()
    assert set(found) == set(expected)
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)
    assert {key for key in expected if expected[key].shape != weights[key].shape} <= resized
    assert all("pos" in key or "operator" in key for key in resized)


def test_prefix_tokens_that_differ() -> None:
    """Class token with and without a position, distillation token, registers: cells stay cells."""
    names = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
    names.append("vit_base_patch16_reg4_gap_256")
    for theirs in names:
        for mine in names:
            source, target = model(theirs, "g1b,rank=3", 64), model(mine, "g1b,rank=3", 96)
            found, _ = fit(target, source.state_dict())
            before, now = places_of_weights(source.state_dict()), places_of_weights(target.state_dict())
            assert before is not None
            assert now is not None
            cells = source.state_dict()["pos_embed"][:, before.embedded :]
            wanted = resample_abs_pos_embed(cells, [6, 6], [4, 4], num_prefix_tokens=0)
            assert torch.equal(found["pos_embed"][:, now.embedded :], wanted)
            key = "blocks.0.attn.operator.W"
            assert found[key].shape == target.state_dict()[key].shape


def test_an_equal_shape_is_no_equal_grid() -> None:
    """Nine tokens: 3×3 cells, or 2×2 behind a class token and four registers."""
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    registers = timm.create_model("vit_tiny_patch16_224", img_size=16, reg_tokens=4, **kwargs)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=24, class_token=False, global_pool="avg", **kwargs)
    source, target = karat.karatize(registers, "g1b,rank=3"), karat.karatize(plain, "g1b,rank=3")
    weights = source.state_dict()
    assert weights["pos_embed"].shape == target.state_dict()["pos_embed"].shape
    found, resized = fit(target, weights, source)
    assert {"pos_embed", "blocks.0.attn.operator.W"} <= resized
    wanted = resample_abs_pos_embed(weights["pos_embed"][:, 5:], [3, 3], [2, 2], num_prefix_tokens=0)
    assert torch.equal(found["pos_embed"], wanted)


@pytest.mark.parametrize(
    ("tokens", "names", "places"),
    [
        (197, ("cls_token",), (TokenGrid(1, 14, 14), 1)),
        (196, ("cls_token",), (TokenGrid(1, 14, 14), 0)),
        (198, ("cls_token", "dist_token"), (TokenGrid(2, 14, 14), 2)),
        (257, ("cls_token", "reg_token"), (TokenGrid(5, 16, 16), 1)),
        (256, ("cls_token", "reg_token"), (TokenGrid(5, 16, 16), 0)),
        (196, (), (TokenGrid(0, 14, 14), 0)),
        (195, (), None),
    ],
)
def test_a_files_tokens(tokens: int, names: tuple[str, ...], places: object) -> None:
    weights = {name: torch.zeros(1, 4 if name == "reg_token" else 1, 8) for name in names}
    assert places_of_weights(weights | {"pos_embed": torch.zeros(1, tokens, 8)}) == places
