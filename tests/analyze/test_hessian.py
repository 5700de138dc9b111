"""Curvature: known eigenvalues and traces, and a Hessian that is the dense one on real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import karat
from karat.analyze.hessian import Hessian, curvature, loss_closure, top_eigenvalues, trace, twice_differentiable

VALUES = torch.tensor([7.0, 3.0, 1.0, 0.5, -2.0, -4.0], dtype=torch.float64)
TINY = {"img_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 1, "num_heads": 2, "num_classes": 3, "mlp_ratio": 1}


def quadratic() -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """Parameters of ½ xᵀ Q diag(VALUES) Qᵀ x, in two parts, and the matrix."""
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    x = torch.randn(6, dtype=torch.float64)
    return nn.Parameter(x[:4].view(2, 2)), nn.Parameter(x[4:]), Q @ VALUES.diag() @ Q.T


def hessian_of_quadratic() -> tuple[Hessian, Tensor]:
    a, b, H = quadratic()

    def loss() -> Tensor:
        x = torch.cat([a.flatten(), b])
        return 0.5 * x @ H @ x

    return Hessian(loss, [a, b]), H


def test_a_quadratics_eigenvalues_and_trace_are_known() -> None:
    hessian, H = hessian_of_quadratic()
    v = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(hessian.times(v), H @ v)
    assert top_eigenvalues(hessian, 3, tolerance=1e-10).tolist() == pytest.approx([7, 3, -4])
    assert top_eigenvalues(hessian, 2, tolerance=1e-10, which="LA").tolist() == pytest.approx([7, 3])
    mean, error = trace(hessian, 4000)
    assert mean == pytest.approx(5.5, abs=5 * error)
    assert error < 0.2
    assert trace(hessian, 1)[1] != trace(hessian, 1)[1]  # NaN: one sample has no error


def test_a_diagonal_trace_needs_one_probe() -> None:
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    hessian = Hessian(lambda: (torch.tensor([1.0, 2.0, 3.0]) * x**2).sum(), [x])
    assert trace(hessian, 2) == (pytest.approx(12), pytest.approx(0))


def test_parameters_that_do_not_matter_and_linear_losses_have_zeros() -> None:
    x, idle = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    product = Hessian(lambda: (x**2).sum(), [x, idle]).times(torch.ones(3, dtype=torch.float64))
    assert product.tolist() == [2, 2, 0]
    assert Hessian(lambda: x.sum(), [x]).times(torch.ones(2, dtype=torch.float64)).tolist() == [0, 0]


def test_no_curvature_has_zeros_and_none_that_is_finite_is_said() -> None:
    x = nn.Parameter(torch.ones(4, dtype=torch.float64))
    assert top_eigenvalues(Hessian(lambda: x.sum(), [x]), 2).tolist() == [0, 0]
    one_class = nn.Linear(3, 1)
    images, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    assert curvature(one_class, images, labels, count=1, samples=2).eigenvalues.tolist() == [0]
    with pytest.raises(ValueError, match="no finite second derivatives"):
        top_eigenvalues(Hessian(lambda: (x**2).sum() * torch.nan, [x]), 1)


def test_bad_counts_are_refused() -> None:
    hessian, _ = hessian_of_quadratic()
    with pytest.raises(ValueError, match="between 1 and 5, got 6"):
        top_eigenvalues(hessian, 6)
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        trace(hessian, 0)
    with pytest.raises(ValueError, match="at least one parameter"):
        Hessian(lambda: torch.zeros(()), [])


@pytest.mark.parametrize("attention", ["softmax", "g1b,rank=2,impl=tiled", "bspline(grid=2,order=3)-u,rank=2"])
@pytest.mark.parametrize("mlp", [None, "kan(grid=2)", "grkan(groups=2)"])
def test_products_are_differences_of_the_gradient(attention: str, mlp: str | None) -> None:
    """H v ≈ (∇L(θ + εv) - ∇L(θ - εv)) / 2ε, the gradient by the fast path."""
    model = karat.create_model("vit_tiny_patch16_224", attention=attention, **TINY).double().eval()
    if mlp is not None:
        karat.models.kan.replace_mlp(model, mlp)
        model.double()
    images, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    parameters = list(model.parameters())
    with torch.no_grad():  # group-rational functions begin on the kink of |P|
        for p in parameters:
            p.add_(torch.randn_like(p), alpha=0.1)
    loss = loss_closure(model, images, labels)
    with twice_differentiable(model):
        hessian = Hessian(loss, parameters)
        v = torch.randn(hessian.size, dtype=torch.float64)
        product = hessian.times(v)

    def gradient(step: float) -> Tensor:
        parts = v.split(hessian.sizes)
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part.view_as(p), alpha=step)
        found = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.sub_(part.view_as(p), alpha=step)
        return torch.cat([g.flatten() for g in found])

    epsilon = 1e-5
    difference = (gradient(epsilon) - gradient(-epsilon)) / (2 * epsilon)
    torch.testing.assert_close(product, difference, atol=1e-6 * float(difference.abs().max()), rtol=1e-4)


def test_curvature_leaves_the_model_as_it_was() -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention="g1b,rank=2,impl=tiled", **TINY).train()
    images, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 2])
    found = curvature(model, images, labels, count=2, samples=2)
    assert found.eigenvalues[0] >= found.eigenvalues[1]
    assert model.training
    assert model.blocks[0].attn.operator.config.impl == "tiled"
    again = curvature(model, images, labels, count=2, samples=2)
    torch.testing.assert_close(again.eigenvalues, found.eigenvalues)
