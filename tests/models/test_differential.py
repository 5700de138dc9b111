"""timm's differential attention in the place of a ViT's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import karat
from karat.models.differential import DifferentialAttention
from karat.models.record import record
from support.small_models import SMALL, images, small_model

VIT = {"num_heads": 2, "embed_dim": 24}


def drawn(name: str = "vit", attention: str = "diff", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return small_model(name, attention, **{**VIT, **kwargs}).double().eval()


def test_it_is_its_formula() -> None:
    """Equations 1 to 3 of arXiv 2410.05258, head by head."""
    model = drawn()
    for depth, block in enumerate(model.blocks):
        attn = block.attn
        nn.init.normal_(attn.sub_norm.weight)
        x = torch.randn(2, 17, 24, dtype=torch.float64)
        q, k, v = attn.qkv(x).chunk(3, -1)
        start = 0.8 - 0.6 * math.exp(-0.3 * depth)
        with torch.no_grad():
            lam = (attn.lambda_q1 @ attn.lambda_k1).exp() - (attn.lambda_q2 @ attn.lambda_k2).exp() + start
        heads = []
        for head in (0, 1):
            mine = [part[..., 12 * head : 12 * head + 12] for part in (q, k, v)]
            maps = [
                (mine[0][..., half] @ mine[1][..., half].transpose(1, 2) / math.sqrt(6)).softmax(-1)
                for half in (slice(0, 6), slice(6, 12))
            ]
            out = (maps[0] - lam * maps[1]) @ mine[2]
            normed = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.sub_norm.weight
            heads.append((1 - start) * normed)
        torch.testing.assert_close(attn(x), attn.proj(torch.cat(heads, -1)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_record_hands_out_what_it_mixes_with(masked: bool) -> None:
    attn = drawn().blocks[1].attn
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    mask = {"attn_mask": (torch.rand(2, 1, 17, 17) > 0.5) | torch.eye(17, dtype=torch.bool)} if masked else {}
    with record(nn.Sequential(attn)) as found:
        out = attn(x, **mask)
    sigma = found["0"].attention
    v = attn.qkv(x)[..., 48:].unflatten(-1, (2, 12)).transpose(1, 2)
    mixed = attn.sub_norm(sigma @ v) * (1 - attn.lambda_init)
    torch.testing.assert_close(attn.proj(mixed.transpose(1, 2).flatten(2)), out)
    if masked:
        assert (sigma[~mask["attn_mask"].expand_as(sigma)] == 0).all()
    assert found["0"].scores.shape == sigma.shape


@pytest.mark.parametrize("name", ["vit", "vit_no_prefix", "deit_distilled"])
def test_weights_of_softmax_stay_and_all_learn(name: str) -> None:
    plain, model = drawn(name, "softmax").state_dict(), drawn(name, "diff,blocks=first")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.items())
    assert [isinstance(block.attn, DifferentialAttention) for block in model.blocks] == [True, False]
    model(images(name).double()).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())
    karat.resample_tokens(model, img_size=24)
    assert model(torch.randn(1, 3, 24, 24, dtype=torch.float64)).shape == (1, 4)


def test_what_it_cant_serve_is_refused() -> None:
    for name in ("convit", "swin", "vit_norms"):
        with pytest.raises(ValueError, match="attention=diff"):
            small_model(name, "diff")
    with pytest.raises(ValueError, match="halves each head, and these are 3 wide"):
        small_model("vit", "diff", num_heads=8)
    with pytest.raises(ValueError, match="it serves timm's ViT and DeiT alone"):
        karat.KArAtOperator(2, 5, "diff")
    with pytest.raises(ValueError, match="it serves timm's ViT and DeiT alone"):
        karat.karatize(nn.TransformerEncoderLayer(8, 2, batch_first=True), "diff", torch.randn(2, 5, 8))
    for more in ("softmax_heads=1", "position_bias=relative", "residual=softmax"):
        with pytest.raises(ValueError, match="doesn't go with diff, a fixed function, which takes blocks, impl alone"):
            small_model("vit", f"diff,{more}")
    with pytest.raises(ValueError, match="converted already"):
        karat.karatize(drawn(), "g3b")
    with pytest.raises(ValueError, match="starts one map a head, and attention=diff has two"):
        small_model("vit", "diff", attn_init="mimetic")
    with pytest.raises(ValueError, match="starts the attention of a ViT or DeiT"):
        karat.create_model("vit_tiny_patch16_224", **SMALL["vit"][1], attn_layer="diff", attn_init="mimetic")
