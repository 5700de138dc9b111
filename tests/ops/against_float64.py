"""Random inputs, and the comparison of an implementation with the definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import parse_basis
from karat.ops import basis_attention


def relative_error(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def assert_matches(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    spec: str,
    impl: str,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Output and gradients of an implementation against the definition in float64 on the same numbers."""
    inputs = [x for x in (q, k, u, bias) if x is not None]
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(*q.shape[:3], u.shape[-1]).to(q.dtype)
    results = []
    for (a, b, c, *rest), way in ((ours, impl), (exact, "reference")):
        out = basis_attention(a, b, c, spec, bias=rest[0] if rest else None, mask=mask, impl=way)
        results.append([out, *torch.autograd.grad(out, [a, b, c, *rest], grad.to(out.dtype))])
    for name, got, wanted in zip(("out", "dq", "dk", "du", "dbias"), *results, strict=False):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= tolerance, name


def make(B: int, H: int, M: int, N: int, D: int, F: int, E: int, per_image: bool = False) -> tuple[Tensor, ...]:
    shape = (B, H, F, N, E) if per_image else (H, F, N, E)
    return torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(shape)


def parameters_of(spec: str) -> int:
    return parse_basis(spec).num_parameters
