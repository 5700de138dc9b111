"""How softmax attention's own weights start."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import karat
from karat.models.create import rebuild_model
from karat.models.starts import STARTS, shifted
from karat.models.transfer import look
from support.small_models import images, small_model
from support.starts import check_published, diagonal, nearest_shift, products, shifts

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
NAME = "vit_tiny_patch16_224"


def started(name: str | None, attention: str = "softmax", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    start = {} if name is None else {"attn_init": name}
    return karat.create_model(NAME, attention, **{**SIZES, **start, **kwargs})


def test_mimetic_is_noise_and_the_identity() -> None:
    model = started("mimetic")
    pairs, out = products(model)
    assert (diagonal(pairs) > 3).all()
    assert (diagonal(out) < -3).all()
    assert torch.linalg.matrix_rank(pairs).eq(16).all()
    noise = out + 0.4 * torch.eye(64)  # of full rank: nothing is cut off
    assert noise.std().item() == pytest.approx(0.4 / math.sqrt(64), rel=0.05)
    # the largest 16 singular values of 0.7 (Z + I) hold more than their share of its power, 2·0.49 a dimension
    assert 16 < pairs.square().sum((-2, -1)).mean().item() / (2 * 0.49) < 64


def test_matched_has_mimetics_sizes_and_no_direction() -> None:
    mimetic, matched = products(started("mimetic")), products(started("matched"))
    for mine, theirs in zip(matched, mimetic, strict=True):
        assert (diagonal(mine).abs() < 1).all()
        sizes = [torch.linalg.svdvals(x).flatten(0, -2).mean(0) for x in (mine, theirs)]
        torch.testing.assert_close(*sizes, rtol=0.05, atol=0.02)
    first = [torch.linalg.svdvals(pairs[0, 0]) for pairs, _ in (mimetic, matched)]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4)  # of the same draws


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"pos_embed": "sincos"},
        {"pos_embed": "sincos", "pos_strength": 0.1},
        {"pos_embed": "sincos", "global_pool": "avg", "class_token": False},
        {"img_size": (32, 48), "reg_tokens": 2, "no_embed_class": True},
    ],
)
def test_impulse_makes_every_head_a_shift(kwargs: dict[str, object]) -> None:
    model = started("impulse", **kwargs)
    found = shifts(model)
    assert min(near for near, _ in found) > 0.95
    assert len({step for _, step in found}) > 1


POOLS = {"class token": {}, "average": {"global_pool": "avg", "class_token": False}}
POSITIONS = {"faint": {}, "strong": {"pos_embed": "sincos"}}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_published_property_on_the_built_model(name: str, pool: str, positions: str) -> None:
    check_published(name, started(name, weight_init="reset", **POOLS[pool], **POSITIONS[positions]))


@pytest.mark.parametrize("pool", POOLS)
def test_images_show_shifts_as_far_as_positions_stand_out(pool: str) -> None:
    """Mean maps of blurred noise: shifts at four times the usual strength of positions, hardly any at timm's."""
    pixels = F.interpolate(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=32)
    very, strong, faint = [], [], []
    settings = (({"pos_embed": "sincos", "pos_strength": 4.0}, very), ({"pos_embed": "sincos"}, strong), ({}, faint))
    for positions, found in settings:
        model = started("impulse", weight_init="reset", **POOLS[pool], **positions).eval()
        N, grid = model.patch_embed.num_patches, model.patch_embed.grid_size
        maps = [seen.attention.mean(0)[:, -N:, -N:] for seen in look(model, pixels).values()]
        found += [nearest_shift(one, grid)[0] for one in torch.cat(maps)]
    assert min(very) > 0.9
    assert 0.5 < min(strong) < fmean(strong) < 0.7
    assert fmean(faint) < 0.35


def test_a_shift_looks_at_the_neighbour() -> None:
    shift = shifted((3, 4), -1, 1)
    for y in range(3):
        for x in range(4):
            expected = torch.zeros(3, 4, dtype=torch.float64)
            if y - 1 >= 0 and x + 1 < 4:
                expected[y - 1, x + 1] = 1
            assert torch.equal(shift[4 * y + x].view(3, 4), expected)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_sets_attention_and_nothing_else(name: str) -> None:
    with torch.no_grad():
        plain, model = started(None).state_dict(), started(name).state_dict()
    for key, value in plain.items():
        assert torch.equal(value, model[key]) == (
            not key.endswith(("qkv.weight", "proj.weight"))
            or "embed" in key
            or (name == "impulse" and key.endswith("proj.weight"))
        )
    assert model["blocks.0.attn.qkv.bias"].eq(0).all()


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("attention", ["g2b", "static-b,residual=softmax"])
def test_an_operator_is_put_into_attention_that_starts_the_same(name: str, attention: str) -> None:
    softmax, model = started(name).state_dict(), started(name, attention).state_dict()
    assert all(torch.equal(value, model[key]) for key, value in softmax.items())
    assert small_model("deit_distilled", attention, attn_init=name, pos_embed="sincos")(images("vit")).isfinite().all()


@pytest.mark.parametrize("name", STARTS)
def test_it_is_a_setting_of_names_registered_ones_too(name: str) -> None:
    torch.manual_seed(0)
    model = karat.create_model(f"karat_{NAME}(attn_init={name})", **SIZES)
    assert str(model.blocks[0].attn.operator.config) == "g3b"
    assert torch.equal(model.blocks[1].attn.qkv.weight, started(name).blocks[1].attn.qkv.weight)
    with torch.device("meta"):
        karat.create_model(NAME, attn_init=name)
    rebuilt = rebuild_model(f"karat_{NAME}(attn_init={name})", **SIZES)  # weights follow: nothing is worked out
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", STARTS)
def test_other_models_are_refused(name: str) -> None:
    for other in ("swin", "convit"):
        with pytest.raises(ValueError, match=f"attn_init={name} starts the attention of a ViT or DeiT, and this is"):
            small_model(other, attn_init=name)
    with pytest.raises(ValueError, match="and this is ResNet"):
        karat.create_model("resnet10t", attn_init=name)
    with pytest.raises(ValueError, match=f"attn_init={name} would undo weights that are loaded"):
        karat.create_model(NAME, attn_init=name, pretrained=True)


def test_a_name_and_arguments_that_differ_are_refused() -> None:
    """Whichever setting it is: the name gave way in silence."""
    for key, named, given in (("attn_init", "mimetic", "impulse"), ("depth", 2, 3), ("pos_strength", 0.5, 1.0)):
        name = f"{NAME}({'pos_embed=sincos,' if key == 'pos_strength' else ''}{key}={named})"
        with pytest.raises(ValueError, match=f"{key}={named} in the model's name and {key}={given} beside it differ"):
            karat.create_model(name, **{**SIZES, key: given})
        saved = rebuild_model(name, **{**SIZES, key: given})  # it was built so
        assert len(saved.blocks) == (3 if key == "depth" else 2)
    with pytest.raises(ValueError, match="attention=g1b in the model's name and attention=softmax beside it differ"):
        karat.create_model(f"karat_{NAME}(attention=g1b)", "softmax", **SIZES)
    model = karat.create_model(f"karat_{NAME}(attention=g1b,depth=2)", "g1b", **SIZES)
    assert str(model.blocks[1].attn.operator.config) == "g1b"


def test_what_cant_be_started_is_told_so() -> None:
    with pytest.raises(ValueError, match="unknown attn_init 'impulses'; choose one of mimetic, impulse, matched"):
        small_model("vit", attn_init="impulses")
    with pytest.raises(ValueError, match=r"unknown attn_init \['mimetic'\]; choose one of"):
        small_model("vit", attn_init=["mimetic"])
    with pytest.raises(ValueError, match="heads of width 8 over 256 patches can't be shifts"):
        started("impulse", img_size=64, num_heads=8, pos_embed="sincos")
    with pytest.raises(ValueError, match="norms of queries and keys undo"):
        small_model("vit_norms", attn_init="impulse")
    with pytest.raises(ValueError, match="needs position embeddings"):
        started("impulse", pos_embed="none")
