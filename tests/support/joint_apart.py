"""Softmax attention and basis attention computed apart, in float64: what joint attention must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from karat import basis_attention
from karat.basis import parse_basis
from karat.ops import joint_attention
from karat.ops.masks import safe_softmax
from support.against_float64 import cancelled, least_cancelling, relative_error

NAMES = ("attended", "sums", "dq", "dk", "dv", "du", "dbias")


def make(
    spec: str,
    sizes: Sequence[int] = (2, 3, 7, 9, 5, 4, 6),
    *,
    per_image: bool = False,
    bias: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, u and perhaps bias; heads between tokens and features, as models cut them. Dilations are no poles."""
    B, H, M, N, D, E, Dv = sizes
    basis = parse_basis(spec)
    q, k, v = (torch.randn(B, n, H, d, dtype=dtype).transpose(1, 2) for n, d in ((M, D), (N, D), (N, Dv)))
    u = torch.randn(*([B] if per_image else []), H, basis.num_parameters, N, E, dtype=dtype)
    if basis.parameters[-1].name == "dilation":
        u.select(-3, -1).abs_().add_(0.5)
    return [q, k, v, u, *([] if bias is None else [torch.randn(*bias, dtype=dtype)])]


def apart(leaves: Sequence[Tensor], spec: str, mask: Tensor | None) -> list[Tensor]:
    """Two separate attentions, and their gradients added."""
    q, k, v, u, *bias = leaves = [x.detach().double().requires_grad_() for x in leaves]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    attended = safe_softmax(scores + bias[0] if bias else scores, mask) @ v
    sums = basis_attention(q, k, u, spec, bias=bias[0] if bias else None, mask=mask, impl="reference")
    weights = [weights_of(x) for x in (attended, sums)]
    first = torch.autograd.grad(attended, leaves, weights[0], materialize_grads=True, allow_unused=True)
    second = torch.autograd.grad(sums, leaves, weights[1], materialize_grads=True, allow_unused=True)
    return [attended, sums, *(a + b for a, b in zip(first, second, strict=True))]


def together(leaves: Sequence[Tensor], spec: str, mask: Tensor | None, impl: str) -> list[Tensor]:
    """Joint attention and its gradients."""
    q, k, v, u, *bias = leaves = [x.detach().requires_grad_() for x in leaves]
    attended, sums = joint_attention(q, k, v, u, spec, bias=bias[0] if bias else None, mask=mask, impl=impl)
    weights = [weights_of(x).to(x.dtype) for x in (attended, sums)]
    return [attended, sums, *torch.autograd.grad((attended, sums), leaves, weights)]


def weights_of(x: Tensor) -> Tensor:
    """A fixed gradient for a result."""
    return torch.linspace(-2, 2, x.numel(), dtype=torch.float64, device=x.device).cos().view(x.shape)


def well_posed(leaves: list[Tensor], spec: str, mask: Tensor | None) -> list[Tensor]:
    """The leaves, with another bias where its gradient, a sum over pairs, cancels beyond what float32 can tell."""
    if len(leaves) < 5:
        return leaves
    *others, bias = leaves
    (B, H, M, _), N = others[0].shape, others[1].shape[2]

    def cancellation(choice: Tensor) -> float:
        return cancelled(apart([*others, choice.expand(B, H, M, N)], spec, mask)[-1], bias.shape)

    return [*others, least_cancelling(lambda: torch.randn_like(bias), bias, cancellation)]


def check(
    leaves: Sequence[Tensor],
    spec: str,
    impl: str,
    mask: Tensor | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Results and gradients of an implementation against the two attentions apart, relative to their norms."""
    wanted, got = apart(leaves, spec, mask), together(leaves, spec, mask, impl)
    for name, x, exact in zip(NAMES, got, wanted, strict=False):
        assert (x.shape, x.dtype) == (exact.shape, leaves[0].dtype), name
        error = relative_error(x, exact) if exact.norm() > 1e-9 else x.abs().max().item()
        assert error <= tolerance, f"{name} of {spec} by {impl}: {error:.1e}"


def some_mask(kind: str | None, B: int, M: int, N: int) -> Tensor | None:
    """Keys or pairs; one row, or one image, sees nothing."""
    if kind is None:
        return None
    mask = torch.rand(B, 1, M if kind == "pairs" else 1, N) > 0.3
    mask[0, :, 0] = False
    return mask
