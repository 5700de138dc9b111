"""The simple formula that lies nearest to a learned function: sin, cos, exp, linear, quadratic or Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]

# Simpler families first; a later one must be better by this share of the function's deviation to be preferred.
PREFERENCE = 1e-3


@dataclass(frozen=True)
class Formula:
    """y ≈ c·f(x; θ) + d, and how far off it is.

    `error` is the root mean square of what is left, as a share of y's standard deviation: 0 exact, 1 no better than
    a constant.
    """

    family: str
    text: str
    error: float
    values: Array  # on the points that were fitted


@dataclass(frozen=True)
class _Family:
    """f(x; θ): `starts` on which the linear part is solved first, `refined` by least squares from the best."""

    shape: Callable[[Array, Array], Array]
    starts: Callable[[Array], list[tuple[float, ...]]]
    text: Callable[[float, float, Array], str]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _shift(d: float) -> str:
    return "" if float(_number(d)) == 0 else f" {'-' if d < 0 else '+'} {_number(abs(d))}"


def _frequencies(x: Array) -> list[tuple[float, ...]]:
    # Down to a quarter of a period over the stretch, up to eight samples a period.
    reach, step = x[-1] - x[0], (x[-1] - x[0]) / (len(x) - 1)
    low, high = 0.5 * np.pi / reach, 0.25 * np.pi / step
    return [(float(a),) for a in np.linspace(low, high, max(64, int(8 * (high - low) * reach / np.pi)))]


def _rates(x: Array) -> list[tuple[float, ...]]:
    reach = x[-1] - x[0]
    return [(float(s * a),) for a in np.geomspace(0.05 / reach, 20 / reach, 40) for s in (1, -1)]


def _bells(x: Array) -> list[tuple[float, ...]]:
    reach, step = x[-1] - x[0], (x[-1] - x[0]) / (len(x) - 1)
    widths = np.geomspace(2 * step, reach, 16)
    return [(float(m), float(s)) for m in np.linspace(x[0], x[-1], 25) for s in widths]


def _quadratic(x: Array) -> list[tuple[float, ...]]:
    reach = x[-1] - x[0]
    return [(float(m),) for m in np.linspace(x[0] - 2 * reach, x[-1] + 2 * reach, 81)]


FAMILIES: dict[str, _Family] = {
    "linear": _Family(lambda x, t: x, lambda x: [()], lambda c, d, t: f"{_number(c)} x{_shift(d)}"),
    "quadratic": _Family(
        lambda x, t: (x - t[0]) ** 2, _quadratic, lambda c, d, t: f"{_number(c)} (x{_shift(-t[0])})²{_shift(d)}"
    ),
    "exp": _Family(
        lambda x, t: np.exp(np.clip(t[0] * (x - x[0 if t[0] < 0 else -1]), -700, 0)),
        _rates,
        lambda c, d, t: f"{_number(c)} exp({_number(t[0])} x){_shift(d)}",
    ),
    "sin": _Family(
        lambda x, t: np.sin(t[0] * x), _frequencies, lambda c, d, t: f"{_number(c)} sin({_number(t[0])} x){_shift(d)}"
    ),
    "cos": _Family(
        lambda x, t: np.cos(t[0] * x), _frequencies, lambda c, d, t: f"{_number(c)} cos({_number(t[0])} x){_shift(d)}"
    ),
    "gaussian": _Family(
        lambda x, t: np.exp(-0.5 * ((x - t[0]) / t[1]) ** 2),
        _bells,
        lambda c, d, t: f"{_number(c)} exp(-(x{_shift(-t[0])})²/(2·{_number(abs(t[1]))}²)){_shift(d)}",
    ),
}


def fit_formula(x: Array, y: Array) -> Formula:
    """The nearest formula to the points y (X,) on an increasing x (X,): see FAMILIES.

    In each family the factor c and the constant d are solved for exactly, the inner parameters sought on a grid and
    refined by least squares. A constant function gives the family "constant".

    Raises ValueError for fewer than 8 points, points that aren't finite, or an x that doesn't increase.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 8:
        raise ValueError(f"a formula needs 8 or more points (X,) for x and y alike; got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or (np.diff(x) <= 0).any():
        raise ValueError("a formula needs finite points and an increasing x")
    deviation = float(y.std())
    mean = float(y.mean())
    if deviation <= 1e-12 * max(abs(mean), 1e-300):
        return Formula("constant", _number(mean), 0.0, np.full_like(y, mean))
    best: Formula | None = None
    for name, family in FAMILIES.items():
        found = _fit(name, family, x, y, deviation)
        if best is None or found.error < best.error - PREFERENCE:
            best = found
    assert best is not None
    return best


def _fit(name: str, family: _Family, x: Array, y: Array, deviation: float) -> Formula:
    starts = np.array(family.starts(x))  # (S, parameters)
    columns = np.stack([family.shape(x, start) for start in starts])  # (S,X)
    centred = columns - columns.mean(1, keepdims=True)
    wanted = y - y.mean()
    energy = (centred**2).sum(1)
    gains = np.where(energy > 1e-300, (centred @ wanted) ** 2 / np.maximum(energy, 1e-300), 0)
    theta = starts[gains.argmax()]

    def near(theta: Array) -> tuple[float, float, Array]:
        column = family.shape(x, theta)
        c, d = _line(column, y)
        return c, d, c * column + d

    if theta.size:
        theta = least_squares(lambda t: (near(t)[2] - y) / deviation, theta, x_scale="jac").x
    shown, d, values = near(theta)
    if name == "exp":  # the column is scaled to at most one so that it can't overflow; the text undoes that
        shown *= float(np.exp(np.clip(-theta[0] * x[0 if theta[0] < 0 else -1], -700, 700)))
    error = float(np.sqrt(np.mean((y - values) ** 2)) / deviation)
    return Formula(name, family.text(shown, d, theta), error, values)


def _line(column: Array, y: Array) -> tuple[float, float]:
    """c, d that make c·column + d nearest to y."""
    centred = column - column.mean()
    energy = float(centred @ centred)
    c = float(centred @ (y - y.mean())) / energy if energy > 1e-300 else 0.0
    d = float(y.mean() - c * column.mean())
    return c, 0.0 if abs(d) < 1e-12 * float(np.abs(y).max()) else d  # what rounding left is no offset
