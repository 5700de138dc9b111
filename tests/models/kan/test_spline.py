"""B-spline layers: scipy's splines, exact refinement, the least-squares optimum after a move."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline as ScipySpline
from torch import Tensor

from karat.models.kan import SplineLinear
from karat.models.kan.knots import KnotSpline


def scipy_values(layer: SplineLinear, x: Tensor) -> Tensor:
    """Σ_q Σ_f c_fqp B_f(x_q), basis function by basis function, zero beyond the knots."""
    c, knots, k = layer.coefficients.detach().numpy(), layer.knots.numpy(), layer.order
    out = np.zeros((len(x), layer.out_features))
    for q in range(layer.in_features):
        for f in range(len(c)):
            element = ScipySpline.basis_element(knots[q, f : f + k + 2], extrapolate=False)
            out += np.nan_to_num(element(x[:, q].numpy()))[:, None] * c[f, q]
    return torch.from_numpy(out)


@pytest.fixture(params=[(1, 3), (5, 1), (8, 2), (5, 3), (4, 5)], ids=str)
def layer(request: pytest.FixtureRequest) -> SplineLinear:
    grid, order = request.param
    torch.set_default_dtype(torch.float64)  # so that the knots are equally spaced to the last bit of float64
    try:
        return SplineLinear(3, 4, grid=grid, order=order, range=2.0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("moved", [None, 0.0, 0.8])
def test_equals_scipy(layer: SplineLinear, moved: float | None) -> None:
    x = 2 * torch.randn(200, 3, dtype=torch.float64)  # beyond the grid too
    if moved is not None:
        layer.update_grid(torch.randn(300, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 3.0]), adaptive=moved)
    assert layer.uniform == (moved != 0.8 or layer.grid == 1)
    torch.testing.assert_close(layer.splines(x), scipy_values(layer, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("adaptive", [0.0, 0.7])
def test_refining_keeps_the_function(layer: SplineLinear, adaptive: float) -> None:
    layer.update_grid(torch.randn(300, 3, dtype=torch.float64), adaptive)
    k = layer.order
    low, high = layer.knots[:, k], layer.knots[:, -1 - k]
    x = low + (high - low) * torch.rand(500, 3, dtype=torch.float64)
    before, grid = layer(x), layer.grid
    layer.refine(3)
    assert layer.grid == 3 * grid
    assert layer.coefficients.shape[0] == 3 * grid + k
    assert layer.coefficients.requires_grad
    torch.testing.assert_close(layer(x), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("adaptive", [0.0, 0.7])
def test_moving_gives_the_least_squares_optimum(layer: SplineLinear, adaptive: float) -> None:
    samples = 1.5 * torch.randn(400, 3, dtype=torch.float64)
    old_basis, old = KnotSpline(layer.knots.clone(), layer.order), layer.coefficients.detach().clone()
    target = torch.einsum("sfq,fqp->qsp", old_basis.features(samples), old)
    layer.update_grid(samples, adaptive)
    features = KnotSpline(layer.knots, layer.order).features(samples).permute(2, 0, 1)  # (Q,S,F)
    residual = features @ layer.coefficients.detach().transpose(0, 1) - target
    # The residual of an optimum is orthogonal to everything that the splines can express.
    assert (features.transpose(1, 2) @ residual).abs().max() < 1e-10
    assert (layer.knots[:, layer.order] <= samples.amin(0)).all()
    assert (layer.knots[:, -1 - layer.order] >= samples.amax(0)).all()


def test_moving_to_equal_samples_stays_finite() -> None:
    layer = SplineLinear(2, 2, grid=4)
    layer.update_grid(torch.ones(10, 2), adaptive=0.9)
    assert layer(torch.randn(5, 2)).isfinite().all()
    assert (layer.knots.diff(dim=1) > 0).all()


def test_knots_travel_with_the_weights() -> None:
    layer, other = SplineLinear(3, 2, grid=6), SplineLinear(3, 2, grid=6)
    layer.update_grid(torch.randn(200, 3), adaptive=0.9)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(20, 3)
    torch.testing.assert_close(other(x), layer(x))
    assert not other.uniform


def test_variance_is_kept_at_the_start() -> None:
    layer = SplineLinear(200, 300)
    assert layer(torch.randn(500, 200)).var().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"grid": 0}, "grid"), ({"order": 0}, "order"), ({"range": -1.0}, "range"), ({"base": "tanh"}, "tanh")],
)
def test_refuses_values_out_of_range(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SplineLinear(2, 2, **settings)


def test_refuses_unusable_moves() -> None:
    layer = SplineLinear(2, 2)
    with pytest.raises(ValueError, match="adaptive"):
        layer.update_grid(torch.randn(5, 2), adaptive=1.0)
    with pytest.raises(ValueError, match="1 sample"):
        layer.update_grid(torch.randn(1, 2))
    with pytest.raises(ValueError, match="factor"):
        layer.refine(0)


def test_copied_knots_are_noticed(layer: SplineLinear) -> None:
    moved = copy.deepcopy(layer)
    moved.update_grid(torch.randn(300, 3, dtype=torch.float64), adaptive=0.9)
    x = torch.randn(50, 3, dtype=torch.float64)
    assert layer.uniform
    layer(x)
    for name, value in moved.state_dict().items():  # as timm's ModelEmaV3 does it
        layer.state_dict()[name].copy_(value)
    assert torch.equal(layer(x), moved(x))
    assert layer.uniform == (layer.grid == 1)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(layer)(x), moved(x))


def test_rounded_knots_still_count_as_equal_steps() -> None:
    for to in (torch.bfloat16, torch.half, "meta"):
        assert SplineLinear(3, 2, grid=5, range=3.0).to(to).uniform


@pytest.mark.slow
def test_compiled_and_exported_layers_know_their_knots() -> None:
    layer, x = SplineLinear(3, 2, grid=6), torch.randn(20, 3)
    early, late, exported = (copy.deepcopy(layer) for _ in range(3))
    compiled = torch.compile(early, backend="eager", fullgraph=True)
    compiled(x)
    layer.knots.copy_(layer.knots.sign() * layer.knots.abs() ** 1.3)
    late.knots.copy_(layer.knots)
    assert not late.uniform
    for other in (early, exported):
        other.load_state_dict(layer.state_dict())
    program = torch.export.export(exported, (x,)).module()
    for run in (compiled, torch.compile(late, backend="eager", fullgraph=True), program):
        torch.testing.assert_close(run(x), layer(x))


def test_refining_keeps_a_frozen_layer_frozen() -> None:
    layer = SplineLinear(3, 2, grid=2).requires_grad_(False)
    layer.refine(2)
    assert not layer.coefficients.requires_grad


def test_splines_of_other_knots_are_other_bases() -> None:
    first, second = (KnotSpline(torch.linspace(0, end, 8).expand(2, -1), 3) for end in (1.0, 2.0))
    assert first != second
    assert {first: 1}.get(second) is None


@pytest.mark.parametrize("adaptive", [0.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_grid_is_not_moved_to_samples_that_are_no_numbers(bad: float, adaptive: float) -> None:
    layer, samples = SplineLinear(6, 4, grid=5), torch.randn(200, 6, dtype=torch.float64)
    samples[3, 2] = bad
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with pytest.raises(ValueError, match="too far apart" if bad == 1e300 else "1 of 200 samples have NaN or inf"):
        layer.update_grid(samples, adaptive)
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())
    with pytest.raises(ValueError, match=r"samples must be \(...,6\)"):
        layer.update_grid(torch.randn(50, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaptive", [0.0, 0.3])
@pytest.mark.parametrize("width", [0.0, 0.01])
def test_moving_to_samples_that_hardly_vary_keeps_the_function_there(
    dtype: torch.dtype, adaptive: float, width: float
) -> None:
    layer, samples = SplineLinear(3, 2, grid=5, base="zero").to(dtype), (1 + width * torch.rand(50, 3)).to(dtype)
    before = layer(samples).float()
    layer.update_grid(samples, adaptive)
    assert before.abs().max() > 0.05
    torch.testing.assert_close(layer(samples).float(), before, rtol=0.03, atol=0.01)
    assert (layer.knots.double().diff(dim=1)[:, layer.order : -layer.order].sum(1) > 0).all()


@pytest.mark.parametrize(("dtype", "adaptive"), [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.999)])
def test_knots_that_would_coincide_are_refused(dtype: torch.dtype, adaptive: float) -> None:
    layer = SplineLinear(3, 2).to(dtype)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"closer than .* can tell apart: give less than adaptive"):
        layer.update_grid(torch.ones(50, 3, dtype=dtype), adaptive)
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())
    layer = layer.bfloat16()
    layer.update_grid(torch.randn(200, 3, dtype=torch.bfloat16), 0.5)
    with pytest.raises(ValueError, match=r"closer than .* can tell apart: give less than factor"):
        layer.refine(1000)


def test_coefficients_that_are_not_finite_are_refused() -> None:
    layer = SplineLinear(3, 2)
    with torch.no_grad():
        layer.coefficients[0, 0, 0] = math.nan
    for change in (lambda: layer.update_grid(torch.randn(50, 3)), lambda: layer.refine(2)):
        with pytest.raises(ValueError, match="coefficients have NaN or inf"):
            change()
