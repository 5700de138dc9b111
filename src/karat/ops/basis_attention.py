"""The front door of basis attention: shapes, checks, choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis, parse_basis
from karat.ops import library, reference
from karat.ops.call import Call
from karat.ops.checks import call_of, checked
from karat.ops.transforms import serving


def basis_attention(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    basis: str | Basis,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum learnable functions of the attention scores over the keys, without keeping the scores (SPEC §8).

    out[b,h,i,e] = Σ_j mask_ij φ(s_ij; u[b or 1,h,:,j,e]),  s_ij = scale · q_i·k_j + bias_ij.
    For a basis that is linear in its parameters this is Σ_j Σ_f mask_ij ψ_f(s_ij) u[b or 1,h,f,j,e].

    Args:
        q: queries (B,H,M,D).
        k: keys (B,H,N,D).
        u: parameters of the edge functions, (H,F,N,E) shared by the batch or (B,H,F,N,E) one set an image.
        basis: the family of edge functions, or its spec; F = basis.num_parameters.
        scale: factor of q·k; None means 1/√D.
        bias: added to the scores, broadcastable to (B,H,M,N).
        mask: boolean, broadcastable to (B,H,M,N); a pair that is False adds exactly zero.
        impl: "reference" (the definition; the only one with second derivatives, forward mode and the transforms of
            torch.func), "tiled", "cpp", "triton", or "auto", the fastest that can serve the call.

    Returns:
        (B,H,M,E) in q's dtype. Sums are accumulated in float32 or better.

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown implementation, or a named one that can't serve
            the call.

    >>> q, k, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    >>> basis_attention(q, k, u, "fourier(grid=3)").shape
    torch.Size([2, 3, 5, 4])
    """
    return basis_sums(call_of(q, k, scale, bias, mask), u, basis, impl)


def basis_sums(call: Call, u: Tensor, basis: str | Basis, impl: str = "auto") -> Tensor:
    """`basis_attention` of a call: the sums (B,H,M,E)."""
    call, _, basis, impl = checked(call, None, u, basis, impl)
    if impl == "reference":
        with reference.full_precision(call.q):
            return reference.basis_attention(call, u, basis)
    q, k, scale, bias, mask = call
    sums: Tensor = library.basis_attention(q, k, u, bias, mask, basis, scale, impl)
    return sums


def basis_contraction(
    x: Tensor, u: Tensor, basis: str | Basis, *, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The same sum for scores that are given: out[b,h,i,e] = Σ_j mask_ij φ(x_ij; u[:,j,e]).

    x (B,H,M,N), u and mask as in `basis_attention`. Meant for few keys: other implementations than the reference
    see it as basis attention with queries x and keys I, which costs N numbers more a score.
    """
    basis = parse_basis(basis)
    if serving(impl, x, u) == "reference":
        dtype = torch.promote_types(x.dtype, torch.float32)
        with reference.full_precision(x):
            return reference.contract(x.to(dtype), u.to(dtype), basis, mask).to(x.dtype)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape[:2], -1, -1)
    return basis_sums(Call(x, eye, 1.0, mask=mask), u, basis, impl)
