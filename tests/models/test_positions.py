"""Position embeddings that start as sines and cosines."""

from __future__ import annotations

import math

import pytest
import torch

import karat
from support.small_models import SMALL, images, small_model


@pytest.mark.parametrize(
    ("name", "prefix"), [("vit", 1), ("vit_no_prefix", 0), ("vit_registers", 0), ("deit_distilled", 2)]
)
def test_each_patch_has_the_sines_and_cosines_of_its_row_and_column(name: str, prefix: int) -> None:
    model = small_model(name, pos_embed="sincos")
    width = SMALL[name][1]["embed_dim"]
    assert (model.pos_embed[0, :prefix] == 0).all()
    assert model.pos_embed.shape[1] == prefix + 16
    for y in range(4):
        for x in range(4):
            expected = [
                wave(place * 10000 ** (-4 * i / width))
                for wave in (math.sin, math.cos)
                for place in (y, x)
                for i in range(width // 4)
            ]
            torch.testing.assert_close(model.pos_embed[0, prefix + 4 * y + x], torch.tensor(expected))


def test_all_else_is_drawn_as_without_them_and_they_are_trained() -> None:
    torch.manual_seed(0)
    plain = small_model("vit", "g2b,residual=softmax")
    torch.manual_seed(0)
    model = small_model("vit", "g2b,residual=softmax", pos_embed="sincos")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (name != "pos_embed")
    model(images("vit")).square().sum().backward()
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad.abs().sum() > 0


def test_they_are_a_setting_of_the_models_name() -> None:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = karat.create_model("vit_tiny_patch16_224(weight_init=reset,pos_embed=sincos)", **sizes)
    assert model.pos_embed.square().mean().item() == pytest.approx(0.5 * 16 / 17)


def test_grids_of_any_shape_and_convits_without_a_place_for_the_class_token() -> None:
    wide = karat.create_model("vit_tiny_patch16_224", img_size=(16, 32), patch_size=8, depth=1, pos_embed="sincos")
    assert wide.pos_embed[0, 4, 48].item() == pytest.approx(math.sin(3))  # the first row's last patch: its column
    assert wide.pos_embed[0, 5, 0].item() == pytest.approx(math.sin(1))  # the second row's first: its row
    assert small_model("convit", pos_embed="sincos").pos_embed.square().mean().item() == pytest.approx(0.5)


def test_what_has_no_place_for_them_is_told_so() -> None:
    with pytest.raises(ValueError, match="SwinTransformer has no learned position embedding"):
        small_model("swin", pos_embed="sincos")
    with pytest.raises(ValueError, match="VisionTransformerSAM has no learned position embedding"):
        karat.create_model("samvit_base_patch16", img_size=32, embed_dim=12, depth=1, num_heads=1, pos_embed="sincos")
    with pytest.raises(ValueError, match="a multiple of 4, and this model's is 30"):
        small_model("vit", pos_embed="sincos", embed_dim=30)
    with pytest.raises(ValueError, match="pos_embed=sincos would undo weights that are loaded"):
        small_model("vit", pos_embed="sincos", pretrained=True)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1])
def test_they_have_the_strength_that_is_asked_for(strength: float) -> None:
    model, whole = (small_model("vit", pos_embed="sincos", **given) for given in ({"pos_strength": strength}, {}))
    torch.testing.assert_close(model.pos_embed, strength * whole.pos_embed)
    named = karat.create_model(f"vit_tiny_patch16_224(pos_embed=sincos,pos_strength={strength})", depth=1)
    assert named.pos_embed[0, 1:].square().mean().item() == pytest.approx(strength**2 / 2)


@pytest.mark.parametrize("strength", [0, -1, float("nan"), "strong", True])
def test_a_strength_that_is_none_is_told_so(strength: object) -> None:
    with pytest.raises(ValueError, match="pos_strength must be a positive number"):
        small_model("vit", pos_embed="sincos", pos_strength=strength)


def test_a_strength_belongs_to_sines_and_cosines() -> None:
    with pytest.raises(ValueError, match="add pos_embed=sincos"):
        small_model("vit", pos_strength=0.5)


@pytest.mark.parametrize("attention", ["softmax", "g2b", "static-b,residual=softmax"])
def test_patches_may_be_averaged_in_place_of_a_class_token(attention: str) -> None:
    name = "vit_tiny_patch16_224(global_pool=avg,class_token=false,pos_embed=sincos)"
    model = karat.create_model(name, attention, **SMALL["vit"][1])
    assert model.cls_token is None
    assert model.pos_embed.shape[1] == 16
    assert model(images("vit")).shape == (2, 1000)
