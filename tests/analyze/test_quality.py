"""Measures of maps at the cases whose value is known."""

from __future__ import annotations

import pytest
import torch

from karat.analyze.quality import (
    box_mask,
    entropy,
    head_diversity,
    iou,
    mass_inside,
    measures,
    negative_mass,
    pointing_game,
    sparsity,
)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_uniform_and_one_key_are_the_extremes(sign: float) -> None:
    uniform, one = sign * torch.full((7,), 1 / 7), sign * torch.eye(7)[3]
    assert entropy(uniform) == pytest.approx(1, abs=1e-6)
    assert entropy(one) == pytest.approx(0, abs=1e-6)
    assert sparsity(uniform) == pytest.approx(0, abs=1e-6)
    assert sparsity(one) == pytest.approx(1, abs=1e-6)
    assert negative_mass(one) == (0 if sign > 0 else 1)


def test_entropy_of_softmax_is_the_usual_one() -> None:
    p = torch.randn(3, 5, dtype=torch.float64).softmax(-1)
    usual = torch.distributions.Categorical(probs=p).entropy() / torch.log(torch.tensor(5.0, dtype=torch.float64))
    assert torch.allclose(entropy(p), usual)


@pytest.mark.parametrize("measure", [entropy, sparsity, negative_mass])
def test_scale_does_not_matter_and_zeros_give_a_number(measure) -> None:
    sigma = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(measure(sigma), measure(7 * sigma))
    assert torch.isfinite(measure(torch.zeros(6)))


def test_diversity_of_equal_and_of_orthogonal_heads() -> None:
    sigma = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert head_diversity(torch.cat([sigma, 3 * sigma], 1)) == pytest.approx([0, 0], abs=1e-12)
    apart = torch.zeros(1, 2, 2, 2)
    apart[0, 0, 0, 0] = apart[0, 1, 1, 1] = 1
    assert head_diversity(apart) == pytest.approx([1.0])
    assert head_diversity(sigma).tolist() == [0, 0]


def test_overlap_with_an_object() -> None:
    mask = box_mask((1, 0, 3, 2), (4, 4))
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 1] = 2.0  # on the object
    maps[1, 3, 3] = 1.0  # beside it
    maps[1, 0, 1] = 0.5
    assert pointing_game(maps, mask).tolist() == [True, False, False]  # the last one points nowhere
    assert mass_inside(maps, mask).tolist() == pytest.approx([1, 1 / 3, 0])
    assert iou(mask, mask) == 1
    assert iou(~mask, mask) == 0
    assert iou(box_mask((1, 0, 2, 2), (4, 4)), mask) == pytest.approx(0.5)


def test_bad_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        box_mask((2, 0, 2, 4), (4, 4))
    with pytest.raises(ValueError, match="upsample"):
        iou(torch.ones(4, 4, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="boolean"):
        pointing_game(torch.ones(4, 4), torch.ones(4, 4))


def test_measures_are_per_head() -> None:
    sigma = torch.stack([torch.eye(4), torch.full((4, 4), 0.25)])[None]
    found = measures(sigma)
    assert found["effective_rank"].tolist() == pytest.approx([4, 1], abs=1e-4)
    assert found["sparsity"].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert {len(values) for values in found.values()} == {2}
