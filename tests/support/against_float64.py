"""Random inputs, and the comparison of an implementation with the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from karat.basis import parse_basis
from karat.ops import basis_attention

HARMLESS = 50.0  # a term's own error is about 1e-7
Drawn = TypeVar("Drawn")


def relative_error(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def cancelled(terms: Tensor, shape: torch.Size) -> float:
    """Σ|terms| / |Σ terms| for sums to `shape`: by so much a sum's relative error exceeds its terms'."""
    sizes = [float(x.sum_to_size(shape).norm()) for x in (terms.abs(), terms)]
    return sizes[0] / sizes[1] if sizes[1] > 0 else 0.0


def least_cancelling(draw: Callable[[], Drawn], first: Drawn, cancellation: Callable[[Drawn], float]) -> Drawn:
    """`first` if its sums don't cancel badly, else the best of some more draws."""
    best, worst = first, cancellation(first)
    for _ in range(20):
        if worst <= HARMLESS:
            break
        other = draw()
        if (found := cancellation(other)) < worst:
            best, worst = other, found
    return best


def well_posed(
    q: Tensor, k: Tensor, u: Tensor, spec: str, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """A bias and a random gradient of the output for which float32 can tell what the bias's gradient is.

    Where a bias is shared its gradient is a sum over pairs, and a sum that happens to cancel has no correct digits in
    float32, whoever computes it: one in fifty single numbers misses 1e-5 in the definition's own float32. Such a
    question is put anew, with other numbers in the same shapes; the bound stays.
    """
    grad = torch.randn(*q.shape[:3], u.shape[-1]).to(q.dtype)
    if bias is None:
        return None, grad
    leaves = [x.detach().double() for x in (q, k, u)]

    def cancellation(choice: tuple[Tensor, Tensor]) -> float:
        each = choice[0].double().expand(*q.shape[:3], k.shape[2]).contiguous().requires_grad_()
        out = basis_attention(*leaves, spec, bias=each, mask=mask, impl="reference")
        return cancelled(torch.autograd.grad(out, each, choice[1].double())[0], bias.shape)

    return least_cancelling(lambda: (torch.randn_like(bias), torch.randn_like(grad)), (bias, grad), cancellation)


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
    bias, grad = well_posed(q, k, u, spec, bias, mask)
    inputs = [x for x in (q, k, u, bias) if x is not None]
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for (a, b, c, *rest), way in ((ours, impl), (exact, "reference")):
        out = basis_attention(a, b, c, spec, bias=rest[0] if rest else None, mask=mask, impl=way)
        results.append([out, *torch.autograd.grad(out, [a, b, c, *rest], grad.to(out.dtype))])
    for name, got, wanted in zip(("out", "dq", "dk", "du", "dbias"), *results, strict=False):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= tolerance, name


def make(B: int, H: int, M: int, N: int, D: int, F: int | str, E: int, per_image: bool = False) -> tuple[Tensor, ...]:
    """q, k and u; F is the number of parameters, or the basis itself."""
    numbers = parameters_of(F) if isinstance(F, str) else F
    u = torch.randn((B, H, numbers, N, E) if per_image else (H, numbers, N, E))
    return torch.randn(B, H, M, D), torch.randn(B, H, N, D), tamed(u, F) if isinstance(F, str) else u


def tamed(u: Tensor, spec: str) -> Tensor:
    """u (…,F,N,E) with dilations of size 1/2 at least, and denominators as they start: where a function is steep, as a
    rational one is near a pole, the scores' own rounding would be all that is seen."""
    rows = [group.name for group in parse_basis(spec).parameters for _ in range(group.count)]
    dilation, denominator = (
        torch.tensor([row == name for row in rows])[:, None, None] for name in ("dilation", "denominator")
    )
    return torch.where(dilation, u + torch.sign(u) / 2, torch.where(denominator, 0.05 + 0.01 * u, u))


def parameters_of(spec: str) -> int:
    return parse_basis(spec).num_parameters


def assert_every_multiple_is_exact(grid: int, impl: str, each: float = 3e-7) -> None:
    """cos(mx) and sin(mx) for m = 1 to `grid`, about 0 and π/2 too, where recurrences lose most, as m·x rounds."""
    around = torch.cat([torch.linspace(-4, 4, 31), torch.linspace(-0.01, 0.01, 21)])
    x = torch.cat([around, around + torch.pi / 2])[None, None, :, None]
    u = torch.eye(2 * grid)[None, :, None, :]
    found = basis_attention(x, torch.ones(1, 1, 1, 1), u, f"fourier(grid={grid})", impl=impl)
    multiples = x.double() * torch.arange(1, grid + 1)
    exact = torch.cat([multiples.cos(), multiples.sin()], -1)
    error = float((found.double() - exact).abs().max())
    assert error <= each * (1 + grid), f"{error:.1e}"
