"""What is shown is what the model computes; rollout, maps and regions by their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import karat
from karat.analyze.attention import (
    attention_of,
    choose_block,
    class_maps,
    dominant_regions,
    grid_of,
    region,
    rollout,
    rollout_maps,
    upsample,
)

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}


@pytest.mark.parametrize("attention", ["softmax", "g2b,rank=4", "g2u,rank=4,residual=softmax", "dog-b,rank=2"])
def test_sigma_is_the_models_own(attention: str) -> None:
    """With σ written out in place of the attention, the model gives the same output."""
    model = karat.create_model("vit_tiny_patch16_224", attention=attention, **SMALL).eval().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    blocks = attention_of(model.float(), images.float())
    assert [block.name for block in blocks] == ["blocks.0.attn", "blocks.1.attn"]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: args[0], f"{name}/out": output})
        )
        for name, module in model.named_modules()
        if name.endswith(".attn")
    ]
    with torch.no_grad():
        model(images.float())
    for handle in handles:
        handle.remove()
    for block in blocks:
        attn = model.get_submodule(block.name)
        x = seen[block.name]
        q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        assert torch.allclose(block.scores, q @ k.transpose(-2, -1) * 8**-0.5, atol=1e-6)
        out = attn.proj((block.sigma @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(out, seen[f"{block.name}/out"], atol=1e-5)


def test_recording_leaves_the_models_mode() -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention="g2b", **SMALL).train()
    attention_of(model, torch.randn(1, 3, 16, 16))
    assert model.training


def test_convit_and_swin_are_recorded_too() -> None:
    swin = karat.create_model("swin_tiny_patch4_window7_224", attention="softmax", depths=(1, 1, 1, 1), embed_dim=24)
    blocks = attention_of(swin, torch.randn(1, 3, 224, 224))
    assert blocks[0].sigma.shape == (64, 3, 49, 49)
    with pytest.raises(ValueError, match="windows, as in Swin"):
        class_maps(blocks[0].sigma, grid_of(swin))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention"):
        attention_of(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no grid of patches"):
        grid_of(timm.create_model("resnet10t"))


def test_rollout_of_identity_is_identity() -> None:
    eye = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    assert torch.equal(rollout([eye] * 4), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def test_rollout_is_the_product_of_the_mixed_blocks() -> None:
    first, second = (torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1) for _ in range(2))
    eye = torch.eye(5, dtype=torch.float64)
    expected = (0.3 * second.mean(1) + 0.7 * eye) @ (0.3 * first.mean(1) + 0.7 * eye)
    assert torch.allclose(rollout([first, second], residual=0.7), expected, atol=1e-12)


def test_rollout_rows_sum_to_one_for_signed_attention() -> None:
    blocks = [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    blocks[1][:, :, 2] = -1  # a row in which all is clipped
    assert torch.allclose(rollout(blocks).sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_rollout_leaves_out_blocks_with_other_tokens() -> None:
    tail = torch.rand(1, 2, 5, 5).softmax(-1)
    assert torch.equal(rollout([torch.rand(1, 2, 4, 4), tail]), rollout([tail]))
    with pytest.raises(ValueError, match="at least"):
        rollout([])


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_class_maps_take_the_class_tokens_row(prefix: int) -> None:
    sigma = torch.randn(2, 3, prefix + 6, prefix + 6)
    maps = class_maps(sigma, (2, 3), signed=True)
    row = sigma[:, :, 0] if prefix else sigma.mean(2)
    assert torch.equal(maps, row[..., prefix:].reshape(2, 3, 2, 3))
    assert torch.equal(class_maps(sigma, (2, 3)), maps.clamp_min(0))
    assert rollout_maps(sigma[:, 0], (2, 3)).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "prefix", "pooled"),
    [
        ({}, 1, False),
        ({"global_pool": "avg"}, 1, True),
        ({"class_token": False, "global_pool": "avg"}, 0, True),
        ({"class_token": False, "reg_tokens": 4, "no_embed_class": True, "global_pool": "avg"}, 4, True),
        ({"reg_tokens": 4, "no_embed_class": True}, 5, False),
    ],
)
def test_maps_are_of_the_tokens_that_the_head_reads(arguments: dict[str, Any], prefix: int, pooled: bool) -> None:
    """The class token's row where the output hangs on that row alone, else the mean over the patches'."""
    model = karat.create_model("vit_tiny_patch16_224", attention="softmax", **SMALL, **arguments).eval()
    grid = grid_of(model)
    sigma = attention_of(model, torch.randn(2, 3, 16, 16))[-1].sigma
    assert grid == (4, 4)
    assert sigma.shape[-1] == prefix + 16
    row = sigma[:, :, prefix:].mean(2) if pooled else sigma[:, :, 0]
    torch.testing.assert_close(class_maps(sigma, grid).flatten(-2), row[..., prefix:])
    flow = rollout([sigma, sigma])
    row = flow[:, prefix:].mean(1) if pooled else flow[:, 0]
    torch.testing.assert_close(rollout_maps(flow, grid).flatten(-2), row[..., prefix:])


def test_region_is_the_smallest_one() -> None:
    maps = torch.tensor([[5.0, 3.0, 1.0], [1.0, 0.0, -4.0]])
    assert region(maps, 0.5).tolist() == [[True, False, False], [False, False, False]]
    assert region(maps, 0.6).sum() == 2
    assert region(maps, 1.0).sum() == 4  # neither zeros nor negative values
    assert not region(torch.zeros(2, 2)).any()
    with pytest.raises(ValueError, match="share"):
        region(maps, 0.0)


def test_dominant_head_and_its_region() -> None:
    maps = torch.full((1, 2, 2, 2), 0.25)
    maps[0, 1] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    heads, picked = dominant_regions(maps)
    assert heads.tolist() == [1]
    assert picked[0].tolist() == [[True, False], [False, False]]


def test_upsampling_keeps_a_constant() -> None:
    assert torch.allclose(upsample(torch.full((2, 3, 4, 4), 0.5), (9, 7)), torch.full((2, 3, 9, 7), 0.5))


def test_unknown_block_names_those_there() -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention="softmax", **SMALL)
    blocks = attention_of(model, torch.randn(1, 3, 16, 16))
    assert choose_block(blocks, None) is blocks[-1]
    with pytest.raises(ValueError, match="block 7 isn't there: the model has blocks 0 to 1"):
        choose_block(blocks, 7)
