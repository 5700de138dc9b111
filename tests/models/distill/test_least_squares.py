"""Regressions from second moments against solutions from the data themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat.models.distill.least_squares import Moments, least_squares, reduced_rank


def problem(rows: int = 60, features: int = 7, targets: int = 5) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    z, y = torch.randn(rows, features).double(), torch.randn(rows, targets).double()
    y = y + z @ torch.randn(features, targets).double()
    moments = Moments.zeros(1, features, targets)
    for part in range(0, rows, 13):  # streamed
        moments.add(0, z[part : part + 13], y[part : part + 13])
    return z, y, moments


def test_closed_form_is_lstsq() -> None:
    z, y, moments = problem()
    beta = least_squares(moments.gram, moments.cross)[0]
    torch.testing.assert_close(beta, torch.linalg.lstsq(z, y).solution)
    left = y - z @ beta
    torch.testing.assert_close(moments.error(beta[None])[0], left.T @ left)
    torch.testing.assert_close(moments.without(beta[None])[0], z.T @ left, atol=1e-9, rtol=0)
    assert moments.rows == 60


def test_ridge_is_lstsq_with_more_rows() -> None:
    z, y, moments = problem()
    level = moments.gram[0].diagonal().mean() * 0.3
    more = torch.cat([z, level.sqrt() * torch.eye(7).double()])
    expected = torch.linalg.lstsq(more, torch.cat([y, torch.zeros(7, 5).double()])).solution
    torch.testing.assert_close(least_squares(moments.gram, moments.cross, 0.3)[0], expected)


def test_features_that_never_vary_get_nothing_infinite() -> None:
    _, _, moments = problem()
    moments.gram[:, 0], moments.gram[:, :, 0], moments.cross[:, 0] = 0, 0, 0
    beta = least_squares(moments.gram, moments.cross)
    assert torch.isfinite(beta).all()
    torch.testing.assert_close(beta[:, 1:], least_squares(moments.gram[:, 1:, 1:], moments.cross[:, 1:]))


def error(moments: Moments, fitted: torch.Tensor, weight: torch.Tensor) -> float:
    return float((moments.error(fitted) * weight).sum())


def some_weight(targets: int = 5) -> torch.Tensor:
    root = torch.randn(1, targets, targets).double()
    return root @ root.mT


def test_full_rank_is_ordinary_least_squares_whatever_the_weight() -> None:
    _, _, moments = problem()
    K, W = reduced_rank(moments.gram, moments.cross, 5, weight=some_weight())
    torch.testing.assert_close(K @ W.mT, least_squares(moments.gram, moments.cross))
    K, W = reduced_rank(moments.gram, moments.cross, 9)
    assert (K.shape, W.shape) == ((1, 7, 9), (1, 5, 9))
    torch.testing.assert_close(K @ W.mT, least_squares(moments.gram, moments.cross))


def test_white_features_give_the_truncated_svd() -> None:
    _, _, moments = problem()
    eye = torch.eye(7).double()[None]
    K, W = reduced_rank(eye, moments.cross, 2)
    U, S, V = torch.linalg.svd(moments.cross[0], full_matrices=False)
    torch.testing.assert_close((K @ W.mT)[0], U[:, :2] * S[:2] @ V[:2])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_no_neighbour_of_that_rank_is_better(seed: int, rank: int) -> None:
    torch.manual_seed(seed)
    _, _, moments = problem()
    weight = some_weight()
    K, W = reduced_rank(moments.gram, moments.cross, rank, weight=weight)
    best = error(moments, K @ W.mT, weight)
    for _ in range(5):
        other = (K + 0.05 * torch.randn_like(K)) @ (W + 0.05 * torch.randn_like(W)).mT
        assert error(moments, other, weight) >= best * (1 - 1e-9)


def test_error_falls_with_the_rank() -> None:
    _, _, moments = problem()
    weight = some_weight()
    errors = []
    for rank in range(1, 6):
        K, W = reduced_rank(moments.gram, moments.cross, rank, weight=weight)
        errors.append(error(moments, K @ W.mT, weight))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(error(moments, least_squares(moments.gram, moments.cross), weight))
