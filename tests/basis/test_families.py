"""What every family of edge functions must satisfy; parametrised over the registry."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.interpolate
import torch
from hypothesis import given
from hypothesis import strategies as st

from karat.basis import BASES, LinearBasis, parse_basis, with_base
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.basis.wavelets import Morlet

VARIANTS = ["fourier(grid=1)", "fourier(grid=11)", "bspline(grid=4,order=1,range=2)", "rational(m=2,n=4)"]
VARIANTS += ["rational(m=6,n=2)", "shannon(window=key)", "silu+fourier(grid=2)", "gelu+dog", "identity+bspline"]
SPECS = [*BASES, *VARIANTS]
LINEAR = [spec for spec in SPECS if isinstance(parse_basis(spec), LinearBasis)]


@pytest.mark.parametrize("spec", SPECS)
def test_spec_parses_back(spec: str) -> None:
    basis = parse_basis(spec)
    assert parse_basis(str(basis)) == basis
    assert str(parse_basis(str(basis))) == str(basis)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_by_hand_equal_autograd(spec: str) -> None:
    basis = parse_basis(spec)
    x = (2 * torch.randn(60, dtype=torch.float64)).requires_grad_()
    u = torch.randn(basis.num_parameters, 60, dtype=torch.float64, requires_grad=True)
    dphi = torch.randn(60, dtype=torch.float64)
    wanted_x, wanted_u = torch.autograd.grad(basis.edge(x, u), (x, u), dphi)
    dx, du = basis.edge_gradients(x.detach(), u.detach(), dphi)
    torch.testing.assert_close(dx, wanted_x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.stack(du), wanted_u, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck(spec: str) -> None:
    basis = parse_basis(spec)
    x = torch.linspace(-1.93, 2.11, 9, dtype=torch.float64).requires_grad_()  # away from knots and kinks
    u = torch.randn(basis.num_parameters, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.edge, (x, u), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("spec", LINEAR)
def test_fast_features_equal_their_definition(spec: str) -> None:
    basis = parse_basis(spec)
    assert isinstance(basis, LinearBasis)
    x = (3 * torch.randn(4, 40, dtype=torch.float64)).requires_grad_()
    psi = basis.features(x)
    out = torch.full_like(psi, math.nan)
    basis.write_features(x.detach(), out)
    torch.testing.assert_close(out, psi)
    dpsi = torch.randn_like(psi)
    (wanted,) = torch.autograd.grad(psi, x, dpsi)
    torch.testing.assert_close(basis.pull_back(x.detach(), out, dpsi.clone()), wanted)


@pytest.mark.parametrize("spec", LINEAR)
def test_edge_is_the_sum_of_features(spec: str) -> None:
    basis = parse_basis(spec)
    assert isinstance(basis, LinearBasis)
    x = torch.randn(7, dtype=torch.float64)
    u = torch.randn(basis.num_parameters, 7, dtype=torch.float64)
    torch.testing.assert_close(basis.edge(x, u), (u * basis.features(x)).sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_large_scores_stay_finite(spec: str, dtype: torch.dtype) -> None:
    basis = parse_basis(spec)
    sizes = torch.cat([torch.logspace(-6, 4, 41), torch.tensor([1.0, 0.0, math.pi])])
    x = torch.cat([sizes, -sizes]).to(dtype).float().requires_grad_()
    u = torch.randn(basis.num_parameters, 30, 1, requires_grad=True)
    y = basis.edge(x, u)
    dx, du = torch.autograd.grad(y.sum(), (x, u))
    by_hand, _ = basis.edge_gradients(x.detach(), u.detach(), torch.ones_like(y))
    for value in (y, dx, du, by_hand):
        assert value.isfinite().all()


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_fourier_is_a_trigonometric_polynomial_of_degree_g(grid: int, seed: int) -> None:
    basis = parse_basis(f"fourier(grid={grid})")
    u = torch.randn(2 * grid, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = 2 * math.pi * torch.arange(32, dtype=torch.float64) / 32
    spectrum = torch.fft.rfft(basis.edge(x, u)) / 16
    assert spectrum[0].abs() < 1e-12  # no constant term
    assert spectrum[grid + 1 :].abs().max() < 1e-12
    torch.testing.assert_close(spectrum[1 : grid + 1].real, u[:grid, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(-spectrum[1 : grid + 1].imag, u[grid:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "order", "reach"), [(10, 3, 4.0), (5, 2, 1.0), (3, 1, 2.5), (7, 4, 3.0)])
def test_bspline_equals_scipy(grid: int, order: int, reach: float) -> None:
    basis = parse_basis(f"bspline(grid={grid},order={order},range={reach})")
    step = 2 * reach / grid
    knots = -reach + step * np.arange(-order, grid + order + 1)
    coefficients = np.random.default_rng(0).normal(size=grid + order)
    x = np.linspace(knots[0] - 1, knots[-1] + 1, 401)
    wanted = np.nan_to_num(scipy.interpolate.BSpline(knots, coefficients, order, extrapolate=False)(x))
    u = torch.from_numpy(coefficients).unsqueeze(-1)
    inside = (x >= -reach) & (x <= reach)
    got = basis.edge(torch.from_numpy(x), u).numpy()
    # scipy calls the base interval [t_k, t_n]; beyond it the same sum of basis functions goes to zero
    elements = [
        scipy.interpolate.BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)
        for i in range(grid + order)
    ]
    everywhere = sum(c * np.nan_to_num(element(x)) for c, element in zip(coefficients, elements, strict=True))
    assert np.abs(got - wanted)[inside].max() < 1e-12
    assert np.abs(got - everywhere).max() < 1e-12
    ones = basis.edge(torch.from_numpy(x[inside]), torch.ones(grid + order, 1, dtype=torch.float64))
    torch.testing.assert_close(ones, torch.ones_like(ones), atol=1e-12, rtol=0)


def _meyer(x: float) -> float:
    def nu(t: float) -> float:
        return 0.0 if t <= 0 else 1.0 if t >= 1 else t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)

    t = nu(abs(x))
    return math.sin(math.pi * abs(x)) * (1.0 if t <= 0.5 else math.cos(math.pi / 2 * nu(2 * t - 1)))


def _shannon(x: float) -> float:
    if abs(x) > 5 * math.pi:
        return 0.0
    return (math.sin(x) / x if x else 1.0) * (0.54 + 0.46 * math.cos(x / 5))


FORMULAS = {
    "mexican_hat": lambda x: 2 / (math.pi**0.25 * math.sqrt(3)) * (x * x - 1) * math.exp(-x * x / 2),
    "morlet": lambda x: math.cos(5 * x) * math.exp(-x * x / 2),
    "dog": lambda x: x * math.exp(-x * x / 2),
    "meyer": _meyer,
    "shannon": _shannon,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("w", "tau", "s"), [(1.0, 0.0, 1.0), (-0.7, 0.4, 2.0), (1.3, -1.0, -0.5)])
def test_wavelets_equal_their_formula(name: str, w: float, tau: float, s: float) -> None:
    x = [i / 10 for i in range(-200, 201)]
    wanted = torch.tensor([w * FORMULAS[name]((value - tau) / s) for value in x], dtype=torch.float64)
    u = torch.tensor([[w], [tau], [s]], dtype=torch.float64)
    got = parse_basis(name).edge(torch.tensor(x, dtype=torch.float64), u)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_dilation_is_kept_from_zero_with_its_sign() -> None:
    basis = parse_basis("dog")
    x = torch.tensor([2e-4], dtype=torch.float64)
    for s, kept in ((0.0, 1e-3), (1e-9, 1e-3), (-1e-9, -1e-3)):
        u = torch.tensor([[1.0], [0.0], [s]], dtype=torch.float64)
        scaled = 2e-4 / kept
        assert basis.edge(x, u).item() == pytest.approx(scaled * math.exp(-scaled * scaled / 2))


def test_rational_equals_its_formula_near_and_far() -> None:
    basis = parse_basis("rational(m=5,n=4)")
    u = torch.randn(10, 1, dtype=torch.float64)
    a, b = u[:6, 0], u[6:, 0]
    x = torch.linspace(-30, 30, 200, dtype=torch.float64)
    numerator = sum(a[i] * x**i for i in range(6))
    denominator = 1 + sum(b[j - 1] * x**j for j in range(1, 5)).abs()
    torch.testing.assert_close(basis.edge(x, u), numerator / denominator, rtol=1e-10, atol=1e-10)


def test_base_activation_is_added() -> None:
    basis = with_base(parse_basis("dog"), "silu")
    x, u = torch.randn(5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    wanted = u[0] * torch.nn.functional.silu(x) + parse_basis("dog").edge(x, u[1:])
    torch.testing.assert_close(basis.edge(x, u), wanted)
    assert with_base(parse_basis("dog"), "zero") == parse_basis("dog")


def test_key_window_is_hamming() -> None:
    gain = parse_basis("shannon(window=key)").key_gain(9)
    assert gain is not None
    torch.testing.assert_close(gain, torch.from_numpy(np.hamming(9)))
    assert parse_basis("shannon").key_gain(9) is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fuorier", "unknown basis 'fuorier'"),
        ("fourier(grid=0)", "grid must be a whole number >= 1, got 0"),
        ("fourier(grid=2.5)", "got 2.5"),
        ("fourier(grid={[]:3})", "got '{[]:3}'"),
        ("fourier(gird=3)", "takes grid="),
        ("fourier(grid=3,grid=4)", "gives grid twice; give it once"),
        (None, "None is no name; write text"),
        (["dog"], "is no name; write text"),
        ("fourier(grid=3", "malformed basis"),
        ("dog(omega=3)", "takes no options"),
        ("bspline(range=-1)", "range must be a number > 0"),
        ("rational(m=0)", "m must be"),
        ("shannon(window=hann)", "window must be one of score, key"),
        ("tanh+dog", "unknown base activation 'tanh'"),
        ("", "malformed basis"),
    ],
)
def test_bad_specs_say_what_to_do(spec: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_basis(spec)
    assert says in str(error.value)


@pytest.mark.parametrize("name", BASES)
def test_every_setting_is_held_to_what_its_default_is(name: str) -> None:
    for field in dataclasses.fields(BASES[name]):
        for value in (True, "3", None, -1, 0, math.inf, *([2.5] if isinstance(field.default, int) else [])):
            with pytest.raises(ValueError, match=f"{name}: {field.name} must be"):
                BASES[name](**{field.name: value})


def test_a_setting_is_of_the_type_that_its_family_says() -> None:
    @dataclasses.dataclass(frozen=True)
    class Bumps(Fourier):
        width: float = 4
        least: int | None = 2
        shift: float = 0.0

    assert Bumps(width=0.5, least=None, shift=-1.5).width == 0.5
    with pytest.raises(ValueError, match="width must be a number > 0, got -1"):
        Bumps(width=-1)


def test_a_setting_is_written_to_the_last_digit() -> None:
    for spec in (BSpline(10, 3, math.pi), Morlet(1 / 3)):
        assert parse_basis(str(spec)) == spec
    assert str(BSpline(10, 3, 4.0)) == "bspline(grid=10,order=3,range=4)"


def test_a_family_registered_again_is_the_one_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first = parse_basis("silu+fourier(grid=2)").inner  # type: ignore[attr-defined]
    again = type("Again", (type(first),), {})
    monkeypatch.setitem(BASES, "fourier", again)
    assert type(parse_basis("silu+fourier(grid=2)").inner) is again  # type: ignore[attr-defined]
    assert type(parse_basis("fourier(grid=2)")) is again
    monkeypatch.delitem(BASES, "fourier")
    with pytest.raises(ValueError, match="unknown basis 'fourier'"):
        parse_basis("fourier(grid=2)")
