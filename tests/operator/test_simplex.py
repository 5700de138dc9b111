"""The simplex projection against a quadratic program, entmax, and its own characterisation."""

from __future__ import annotations

import pytest
import torch
from entmax import sparsemax
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from karat import simplex_projection

NUMBERS = st.lists(st.floats(-30, 30), min_size=1, max_size=9)


def test_equals_the_quadratic_program() -> None:
    for _ in range(5):
        y = torch.randn(6, dtype=torch.float64)
        point = y.numpy()
        solution = minimize(
            lambda x, y=point: ((x - y) ** 2).sum(),
            x0=[1 / 6] * 6,
            jac=lambda x, y=point: 2 * (x - y),
            bounds=[(0, None)] * 6,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        torch.testing.assert_close(simplex_projection(y), torch.from_numpy(solution.x), atol=1e-6, rtol=0)


@given(NUMBERS)
def test_equals_sparsemax(numbers: list[float]) -> None:
    y = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(simplex_projection(y), sparsemax(y, dim=-1), atol=1e-9, rtol=0)


@given(NUMBERS, st.floats(-1e3, 1e3))
def test_lies_on_the_simplex_and_ignores_shifts(numbers: list[float], shift: float) -> None:
    y = torch.tensor(numbers, dtype=torch.float64)
    x = simplex_projection(y)
    assert (x >= 0).all()
    assert x.sum().item() == pytest.approx(1)
    torch.testing.assert_close(simplex_projection(y + shift), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(simplex_projection(x), x, atol=1e-9, rtol=0)


def test_gradient_is_sparsemax_s() -> None:
    y = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 7, dtype=torch.float64)
    (got,) = torch.autograd.grad(simplex_projection(y), y, grad)
    (wanted,) = torch.autograd.grad(sparsemax(y, dim=-1), y, grad)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(simplex_projection, (y,))


@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=9))
def test_mask_equals_leaving_out(entries: list[tuple[float, bool]]) -> None:
    y = torch.tensor([value for value, _ in entries], dtype=torch.float64)
    mask = torch.tensor([keep for _, keep in entries])
    x = simplex_projection(y, mask)
    assert (x[~mask] == 0).all()
    if mask.any():
        torch.testing.assert_close(x[mask], simplex_projection(y[mask]), atol=1e-9, rtol=0)


def test_large_entries_lose_no_digits() -> None:
    y = torch.tensor([1e6, 1e6 + 0.25, -1e6])
    torch.testing.assert_close(simplex_projection(y), torch.tensor([0.375, 0.625, 0.0]))
