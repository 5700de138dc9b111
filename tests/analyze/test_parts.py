"""What attention consists of: each kind alone, sums of kinds, models whose operators are known."""

from __future__ import annotations

import pytest
import torch

import karat
from karat.analyze.attention import attention_of
from karat.analyze.parts import parts_of, shares
from support.small_models import images, small_model

SIZES = {"img_size": 32, "depth": 2, "num_classes": 10}


def test_each_kind_alone_has_all_the_power() -> None:
    B, H, N = 6, 2, 5
    row = torch.rand(1, H, 1, N).expand(B, H, N, N)
    place = torch.randn(1, H, N, N).expand(B, H, N, N)
    place = place - place.mean(2, keepdim=True)
    for sigma, kind in ((row, "row"), (place, "place")):
        found = shares(sigma)
        for name in ("row", "place", "scores"):
            expected = torch.full((H,), float(name == kind), dtype=torch.float64)
            torch.testing.assert_close(getattr(found, name), expected, atol=1e-6, rtol=0)
    noise = shares(torch.randn(3000, H, N, N))
    assert (noise.scores > 0.99).all()
    assert (torch.stack([noise.row, noise.place]).abs() < 0.01).all()


def test_powers_of_independent_kinds_add_up() -> None:
    torch.manual_seed(0)
    B, N = 4000, 4
    row, place = torch.randn(1, 1, 1, N), torch.randn(1, 1, N, N)
    place = place - place.mean(2, keepdim=True)
    found = shares(row + place + torch.randn(B, 1, N, N))
    powers = row.square().sum(), place.square().sum(-1).mean(), torch.tensor(float(N))
    total = sum(powers)
    torch.testing.assert_close(found.power[0].float(), total, rtol=0.03, atol=0)
    for name, power in zip(("row", "place", "scores"), powers, strict=True):
        torch.testing.assert_close(getattr(found, name)[0].float(), power / total, atol=0.02, rtol=0)


def test_few_images_hide_nothing_on_average() -> None:
    torch.manual_seed(0)
    scores = torch.stack([shares(torch.randn(2, 1, 3, 3)).scores for _ in range(2000)]).mean()
    assert abs(float(scores) - 1) < 0.02


def test_static_mixing_beside_softmax_owes_nothing_to_the_scores() -> None:
    torch.manual_seed(0)
    model = karat.create_model("vit_tiny_patch16_224", "static-b,residual=softmax,softmax_heads=1", **SIZES)
    gates = torch.tensor([0.5, -2.0])
    for block in model.blocks:
        block.attn.operator.gate.data.copy_(gates)
    found = parts_of(model, attention_of(model, torch.randn(4, 3, 32, 32)))
    assert [part.name for part in found] == ["blocks.0.attn", "blocks.1.attn"]
    for part, block in zip(found, model.blocks, strict=True):
        op = block.attn.operator
        assert part.heads == (0, 1)
        torch.testing.assert_close(part.gates, gates)
        assert (part.learned.scores.abs() < 1e-6).all()
        assert (part.softmax.scores > 0).all()
        matrix = gates[:, None, None] * (op.places @ op.projector.transpose(-2, -1)).detach()
        torch.testing.assert_close(part.learned.power.float(), matrix.square().sum(-1).mean(-1), rtol=1e-4, atol=0)
        torch.testing.assert_close(part.size, (part.learned.power / part.softmax.power).sqrt())


def test_a_fixed_gate_and_no_softmax() -> None:
    images = torch.randn(3, 3, 32, 32)
    fixed = karat.create_model("vit_tiny_patch16_224", "g1b,residual=softmax,gate=0.25,blocks=(1,)", **SIZES)
    (part,) = parts_of(fixed, attention_of(fixed, images))
    assert part.name == "blocks.1.attn"
    assert part.gates.tolist() == [0.25] * 3
    alone = karat.create_model("vit_tiny_patch16_224", "g1b", **SIZES)
    found = parts_of(alone, attention_of(alone, images))
    assert [one.gates.tolist() for one in found] == [[1.0] * 3] * 2
    sigma = attention_of(alone, images)[0].sigma
    torch.testing.assert_close(found[0].learned.power, sigma.double().square().sum(-1).mean((0, 2)))


def test_softmax_has_no_learned_part_and_one_image_is_too_few() -> None:
    model = karat.create_model("vit_tiny_patch16_224", "softmax", **SIZES)
    assert parts_of(model, attention_of(model, torch.randn(2, 3, 32, 32))) == []
    with pytest.raises(ValueError, match="two images or more"):
        shares(torch.rand(1, 1, 3, 3))


def test_windows_have_no_such_parts() -> None:
    model = small_model("swin", "g2b,rank=3,residual=softmax")
    with pytest.raises(ValueError, match=r"SwinTransformer is cut into windows.*need a ViT, DeiT or ConViT"):
        parts_of(model, attention_of(model, images("swin")))


def test_softmax_of_shifted_windows_is_masked_as_the_model_masks_it() -> None:
    """Gates start at zero: σ is what the softmax model does."""
    model = small_model("swin", "g2b,rank=3,residual=softmax")
    blocks = attention_of(model, images("swin"))
    assert any(block.mask is not None and not block.mask.all() for block in blocks)
    for block in blocks:
        torch.testing.assert_close(block.softmax, block.sigma)
