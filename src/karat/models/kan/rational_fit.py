"""Rational functions that begin as a known activation, and the gain of one."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from karat.basis import ACTIVATIONS

IDENTITY = "identity"
TARGETS = tuple(ACTIVATIONS)
_NEAR, _FAR, _FAR_WEIGHT = 3.0, 10.0, 0.1


@lru_cache(maxsize=32)
def fit_rational(
    target: str, m: int = 5, n: int = 4, terms: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients (a_0..a_m), (b_1..b_n) of the safe Padé function nearest to a target, by least squares.

    `terms` says which of the denominators of `karat.models.kan.rational.group_rational`.

    Points on [-3, 3], where activations mostly lie, count fully, those on [-10, 10] a tenth: a fit to the first
    alone may end at -10 far from the target, and weights taken over from a ViT do reach there. Identity is exact.

    Raises ValueError for an unknown target.

    >>> a, b = fit_rational("gelu")
    >>> len(a), len(b)
    (6, 4)
    """
    if target == IDENTITY:
        return (0.0, 1.0, *[0.0] * (m - 1)), (0.0,) * n
    if target not in TARGETS:
        raise ValueError(f"unknown activation {target!r}; choose one of {', '.join(TARGETS)}")
    from scipy.optimize import least_squares  # a slow import that few need

    near, far = np.linspace(-_NEAR, _NEAR, 301), np.linspace(-_FAR, _FAR, 301)
    x = np.concatenate([near, far])
    weight = np.concatenate([np.ones_like(near), np.full_like(far, _FAR_WEIGHT)])
    y = ACTIVATIONS[target].value(torch.from_numpy(x)).numpy()

    def error(p: np.ndarray) -> np.ndarray:
        return weight * (_rational(p[: m + 1], p[m + 1 :], x, terms) - y)

    def start(small: float) -> np.ndarray:
        """x/2 + x²·0.4/(1 + 0.3 x²), roughly; `small` puts weight on the other terms."""
        p = np.full(m + 1 + n, small)
        p[1 : min(m + 1, 4)] = (0.5, 0.4, 0.1)[:m]
        p[m + min(n, 2)] = 0.3
        return p

    best = min((least_squares(error, start(small), max_nfev=400) for small in (1e-3, 1e-2)), key=lambda r: r.cost)
    return tuple(best.x[: m + 1].tolist()), tuple(best.x[m + 1 :].tolist())


def _rational(a: np.ndarray, b: np.ndarray, x: np.ndarray, terms: bool) -> np.ndarray:
    polyval, z = np.polynomial.polynomial.polyval, x
    if terms:
        z, b = np.abs(x), np.abs(b)
    return polyval(x, a) / (1 + np.abs(z * polyval(z, b)))


@lru_cache(maxsize=32)
def gain(target: str, m: int = 5, n: int = 4, terms: bool = False) -> float:
    """α = Var[x] / E[F(x)²] for x ~ N(0,1) and F the fit to `target` (KAT, Table 3): weights with variance α/Q keep it.

    >>> round(gain("identity"), 6)
    1.0
    """
    a, b = fit_rational(target, m, n, terms)
    x = np.linspace(-10, 10, 4001)
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    values = _rational(np.array(a), np.array(b), x, terms) ** 2 * density
    return float(1 / np.trapezoid(values, x))
