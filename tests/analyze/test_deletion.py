"""Deletion: maps that mark what the model looks at score high, their opposites low."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from karat.analyze.attention import BlockAttention, attention_of, grid_of
from karat.analyze.deletion import faithfulness, flow_maps, halves, without
from karat.models.create import create_model


class LeftHalf(nn.Module):
    """Two classes, told apart by the mean of the left half of an image."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images[..., : images.shape[-1] // 2].mean((1, 2, 3))
        return torch.stack([mean, -mean], 1) * 8


def test_a_map_of_what_the_model_sees_is_faithful() -> None:
    images = torch.ones(3, 3, 8, 8) * torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1)
    left = torch.zeros(3, 4, 4)
    left[..., :2] = 1
    expected = 1 / (1 + torch.exp(-16 * torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))) - 0.5
    model = LeftHalf().train()
    torch.testing.assert_close(faithfulness(model, images, left), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(faithfulness(model, images, -left), -expected, rtol=1e-5, atol=1e-6)
    assert model.training


@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (2, 5)])
def test_halves_are_the_largest_and_the_smallest(grid: tuple[int, int]) -> None:
    maps = torch.rand(5, *grid)
    most, least = halves(maps)
    half = grid[0] * grid[1] // 2
    assert (most.sum((1, 2)) == half).all()
    assert (least.sum((1, 2)) == half).all()
    assert not (most & least).any()
    smallest = maps.masked_fill(~most, 2).amin((1, 2))
    assert (smallest > maps.masked_fill(~least, -1).amax((1, 2))).all()


def test_equal_values_are_ordered_at_random() -> None:
    most, _ = halves(torch.zeros(400, 4, 4))
    assert (most.float().mean(0) - 0.5).abs().max() < 0.15
    torch.testing.assert_close(halves(torch.zeros(4, 2, 2))[0], halves(torch.zeros(4, 2, 2))[0])


def test_patches_are_taken_away_whole() -> None:
    chosen = torch.zeros(1, 2, 2, dtype=torch.bool)
    chosen[0, 0, 1] = True
    left = without(torch.ones(1, 3, 4, 4), chosen)
    assert left[..., :2, 2:].eq(0).all()
    assert left.sum() == 3 * 12


@pytest.mark.parametrize("attention", ["softmax", "g1b,rank=2"])
def test_maps_of_a_vit(attention: str) -> None:
    model = create_model(
        "vit_tiny_patch16_224", attention=attention, num_classes=3, img_size=8, patch_size=2, embed_dim=16, depth=2,
        num_heads=2,
    )  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    maps = flow_maps(attention_of(model, images), grid_of(model))
    assert maps.shape == (4, 4, 4)
    assert (maps >= 0).all()
    assert faithfulness(model, images, maps).abs().max() <= 1


def test_attention_in_windows_has_no_such_map() -> None:
    sigma = torch.rand(8, 2, 4, 4)
    with pytest.raises(ValueError, match="windows"):
        flow_maps([BlockAttention("block", sigma, sigma)], (4, 4))
