"""Layers that are linear in their parameters: the written-out sum, its gradients, blocks, precisions, tracing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karat.basis import LinearBasis, parse_basis
from karat.models.kan import RBF, FourierLinear, RBFLinear, SplineLinear
from karat.models.kan import feature_linear as module
from karat.models.kan.feature_linear import feature_linear
from karat.models.kan.knots import KnotSpline

KNOTS = torch.tensor([-3.0, -2.2, -1.0, -0.7, 0.3, 0.9, 2.0, 2.5, 3.1], dtype=torch.float64).repeat(3, 1)
BASES: dict[str, LinearBasis] = {
    "bspline": parse_basis("bspline(grid=5,order=3)"),
    "fourier": parse_basis("fourier(grid=3)"),
    "rbf": RBF(6, 2.0),
    "knots": KnotSpline(KNOTS, 3),
}
LAYERS = {"spline": SplineLinear, "fourier": FourierLinear, "rbf": RBFLinear}


@pytest.fixture(params=BASES)
def basis(request: pytest.FixtureRequest) -> LinearBasis:
    return BASES[request.param]


def test_equals_the_sum_and_its_gradients(basis: LinearBasis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_ROWS", 2)  # several blocks, the last one shorter
    monkeypatch.setitem(module._CHUNK, "cpu", 1)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(basis.num_parameters, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = (
        torch.stack(
            [sum(basis.edge(x[:, q], weight[:, q, p, None])[..., None] for q in range(3)) for p in range(4)], dim=1
        ).squeeze(-1)
        if not isinstance(basis, KnotSpline)
        else torch.einsum("tfq,fqp->tp", basis.features(x), weight)
    )
    torch.testing.assert_close(feature_linear(x, weight, basis), expected)
    assert torch.autograd.gradcheck(lambda x, w: feature_linear(x, w, basis), (x, weight))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_differentiate(name: str) -> None:
    layer = LAYERS[name](3, 2).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("name", LAYERS)
def test_variance_is_kept_at_the_start(name: str) -> None:
    layer: nn.Module = LAYERS[name](200, 300)
    assert layer(torch.randn(500, 200)).var().item() == pytest.approx(1, abs=0.1)


def test_nothing_as_large_as_the_features_is_kept(basis: LinearBasis) -> None:
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(basis.num_parameters, 3, 4, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        feature_linear(x, weight, basis)
    assert sum(kept) == x.numel() + weight.numel()


def test_autocast_keeps_features_in_float32(basis: LinearBasis) -> None:
    x = torch.randn(20, 3)
    weight = torch.randn(basis.num_parameters, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = feature_linear(x, weight, basis)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), feature_linear(x, weight, basis), atol=0.2, rtol=0.05)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_export_traces_the_plain_formula(name: str) -> None:
    layer = LAYERS[name](3, 2).eval()
    x = torch.randn(5, 3)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="F, Q, P"):
        feature_linear(torch.randn(2, 3), torch.randn(5, 3, 2), BASES["rbf"])
