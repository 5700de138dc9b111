"""Ranks that were planted are found."""

from __future__ import annotations

import pytest
import torch

from karat.analyze.spectrum import effective_rank, scree_index, singular_values, spectrum


def planted(rank: int, size: int = 20) -> torch.Tensor:
    """A matrix with `rank` singular values of 1, the others zero."""
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for _ in range(2))
    return left @ right.T


@pytest.mark.parametrize("rank", [1, 3, 12, 20])
def test_a_planted_rank_is_found_by_both(rank: int) -> None:
    values = singular_values(planted(rank))
    assert effective_rank(values) == pytest.approx(rank, rel=1e-6)
    if rank < 20:
        assert scree_index(values) == rank


def test_a_low_rank_operators_sigma_has_its_rank() -> None:
    import karat

    op = karat.KArAtOperator(2, 20, "g3b,rank=4").double()
    sigma = op(torch.randn(3, 2, 20, 20, dtype=torch.float64))
    values = singular_values(sigma.detach())
    assert ((values > 1e-10 * values[..., :1]).sum(-1) == 4).all()


def test_spectrum_summarises_heads_and_images() -> None:
    matrices = torch.stack([planted(2), 3 * planted(4)]).unsqueeze(0)
    found = spectrum(matrices)
    assert found.mean.tolist() == pytest.approx([2.0] * 2 + [1.5] * 2 + [0.0] * 16, abs=1e-9)
    assert found.low[:4].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-9)
    assert found.high[:4].tolist() == pytest.approx([3] * 4, abs=1e-9)
    assert found.effective_rank == pytest.approx(3)


def test_zero_matrices_have_rank_zero_and_nan_is_refused() -> None:
    zeros = singular_values(torch.zeros(5, 5))
    assert effective_rank(zeros) == scree_index(zeros) == 0
    with pytest.raises(ValueError, match="finite"):
        singular_values(torch.full((2, 2), torch.nan))
