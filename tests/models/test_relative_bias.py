"""Relative position biases: their matrix, beside softmax and learnable attention, other grids, saved and recorded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import karat
from karat.detect.trunk import create_trunk
from karat.models.attention import BiasedAttention
from karat.models.backbones import backbone_of
from karat.models.relative_bias import RelativeBias, relative_biases
from support.small_models import SMALL, images, small_model

BIASED = ["softmax,position_bias=relative", "g2b,rank=3,position_bias=relative", "g2u,position_bias=relative"]
VITS = [name for name in SMALL if backbone_of(small_model(name)).prefix is not None]


def drawn(model: nn.Module) -> nn.Module:
    """The biases start at zero: here they speak."""
    for bias in relative_biases(model).values():
        for parameter in bias.parameters():
            nn.init.normal_(parameter)
    return model


def by_hand(bias: RelativeBias) -> Tensor:
    """bias_h(k, n), pair by pair."""
    (height, width), prefix = bias.grid, bias.prefix
    cells = [None] * prefix + [(y, x) for y in range(height) for x in range(width)]
    rows = []
    for a in cells:
        row = []
        for b in cells:
            if a is not None and b is not None:
                row.append(bias.table[:, a[0] - b[0] + height - 1, a[1] - b[1] + width - 1])
            else:
                row.append(bias.prefix_table[:, 2 if a is b else 0 if a is None else 1])
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)[None]


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_one_number_for_each_offset(prefix: int) -> None:
    bias = drawn(RelativeBias(2, (3, 4), prefix))
    assert torch.equal(bias(), by_hand(bias))


@pytest.mark.parametrize("name", VITS)
def test_softmax_without_a_bias_yet_is_the_plain_model(name: str) -> None:
    plain = small_model(name).eval()
    biased = karat.karatize(copy.deepcopy(plain), BIASED[0])
    assert all(torch.equal(biased.state_dict()[key], value) for key, value in plain.state_dict().items())
    x = images(name)
    torch.testing.assert_close(biased(x), plain(x), atol=1e-6, rtol=1e-5)


def test_softmax_of_scores_with_the_bias() -> None:
    model = drawn(small_model("vit_norms", BIASED[0])).eval()
    attn = model.blocks[1].attn
    assert type(attn) is BiasedAttention
    x, mask = torch.randn(2, 17, 24), torch.rand(2, 1, 1, 17) > 0.3
    q, k, v = attn.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind()
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale + by_hand(attn.position_bias)
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    wanted = attn.proj(attn.norm(out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(attn(x, attn_mask=mask), wanted)
    with karat.record(model) as seen:
        model(images("vit_norms"))
    block = seen["blocks.1.attn"]
    torch.testing.assert_close(block.attention, block.scores.softmax(-1))


@pytest.mark.parametrize("attention", BIASED[1:])
def test_learnable_attention_sees_the_bias_in_its_scores(attention: str) -> None:
    model = drawn(small_model("vit", attention)).eval()
    attn = model.blocks[0].attn
    x = torch.randn(2, 17, 24)
    q, k, v = attn.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind()
    sigma = attn.operator(q @ k.transpose(-2, -1) * attn.scale + by_hand(attn.position_bias))
    torch.testing.assert_close(attn(x), attn.proj((sigma @ v).transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)
    assert len(relative_biases(model)) == 2  # each block its own, whatever the operator is


@pytest.mark.parametrize("attention", BIASED)
@pytest.mark.parametrize("name", ["vit", "vit_registers", "convit"])
def test_saved_and_loaded_and_trained(name: str, attention: str, tmp_path: Path) -> None:
    model = drawn(small_model(name, attention))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = small_model(name, attention)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = images(name)
    assert torch.equal(again.eval()(x), model.eval()(x))
    model.train()(x).square().sum().backward()
    first, *_ = relative_biases(model).values()  # of the last block the class token's row alone matters
    assert all(parameter.grad.abs().sum() > 0 for parameter in first.parameters())
    listed = model.no_weight_decay()
    assert all(f"{prefix}.table" in listed for prefix in relative_biases(model))


@pytest.mark.parametrize("attention", BIASED)
def test_other_grids(attention: str) -> None:
    model = drawn(small_model("vit", attention, dynamic_img_size=True)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    karat.resample_tokens(model, img_size=16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(2, 3, 24, 40)
    on_the_way = model(x)  # by the images at hand
    resampled = karat.resample_tokens(copy.deepcopy(model), img_size=(24, 40))
    torch.testing.assert_close(resampled(x), on_the_way)
    assert {bias.grid for bias in relative_biases(resampled).values()} == {(6, 10)}
    by_timm = copy.deepcopy(model)
    by_timm.set_input_size(img_size=(24, 40))
    assert torch.equal(by_timm(x), resampled(x))
    for prefix in (0, 3):
        moved = karat.resample_tokens(copy.deepcopy(model), num_prefix_tokens=prefix)
        assert moved(torch.randn(1, 3, 16, 16)).isfinite().all()
        for name, bias in relative_biases(moved).items():
            assert torch.equal(bias.table, before[f"{name}.table"])
            assert bias().shape[-1] == prefix + 16


def test_a_constant_bias_is_the_same_on_every_grid() -> None:
    bias = RelativeBias(2, (3, 4), 1)
    for parameter in bias.parameters():
        nn.init.constant_(parameter, 0.3)
    bias.resample((6, 5), 1)
    torch.testing.assert_close(bias(), torch.full((1, 2, 31, 31), 0.3))


def test_what_has_no_place_for_it_says_so() -> None:
    with pytest.raises(ValueError, match="SwinTransformer has relative position biases of its own"):
        small_model("swin", BIASED[0])
    with pytest.raises(ValueError, match="a sequence no grid of tokens"):
        karat.SequenceAttention(24, 3, 9, BIASED[1])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn is an attention of karat's"):
        karat.karatize(small_model("vit", BIASED[0]), "g3b")
    with pytest.raises(ValueError, match="--rel-pos"):
        create_trunk("vit_tiny_patch16_224", BIASED[1], img_size=64, window=2, depth=4, embed_dim=24, num_heads=3)
