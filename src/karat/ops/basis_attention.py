"""The front door of basis attention: shapes, checks, choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis, parse_basis
from karat.ops import library, reference
from karat.ops.implementations import IMPLEMENTATIONS

IMPLS = ("auto", "reference", *IMPLEMENTATIONS)


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
        impl: "reference" (the definition; the only one with second derivatives), "tiled", "cpp", "triton",
            or "auto", the fastest that can serve the call.

    Returns:
        (B,H,M,E) in q's dtype. Sums are accumulated in float32 or better.

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown implementation, or a named one that can't serve
            the call.

    >>> q, k, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    >>> basis_attention(q, k, u, "fourier(grid=3)").shape
    torch.Size([2, 3, 5, 4])
    """
    basis = parse_basis(basis) if isinstance(basis, str) else basis
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    _check(q, k, u, basis)
    bias = None if bias is None else _four_axes(bias, "bias", q, k)
    mask = None if mask is None else _four_axes(mask, "mask", q, k)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = takes part), got {mask.dtype}; write mask > threshold")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # The autocast rule: scores are products, so their factors go to the low precision; sums stay in float32.
        low = torch.get_autocast_dtype(q.device.type)
        q, k = q.to(low), k.to(low)
    if impl == "reference":
        with reference.full_precision(q):
            return reference.basis_attention(q, k, u, basis, factor, bias, mask)
    return library.basis_attention(q, k, u, bias, mask, str(basis), factor, impl)


def _check(q: Tensor, k: Tensor, u: Tensor, basis: Basis) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be (B,H,M,D) and k (B,H,N,D) with equal B, H, D; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, H, N = q.shape[0], q.shape[1], k.shape[2]
    shared = (H, basis.num_parameters, N)
    if u.dim() not in (4, 5) or u.shape[-4:-1] != shared or (u.dim() == 5 and u.shape[0] != B):
        raise ValueError(
            f"u must be (H,F,N,E) or (B,H,F,N,E) with B={B}, H={H}, F={basis.num_parameters} ({basis}), N={N}; "
            f"got {tuple(u.shape)}"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype and u.is_floating_point()):
        raise ValueError(
            f"q, k and u must be floating point, q and k of one dtype; got {q.dtype}, {k.dtype}, {u.dtype}"
        )
    if not q.device == k.device == u.device:
        raise ValueError(f"q, k and u must be on one device; got {q.device}, {k.device}, {u.device}")


def _four_axes(x: Tensor, name: str, q: Tensor, k: Tensor) -> Tensor:
    full = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to (B,H,M,N) = {full}, got {tuple(x.shape)}")
    return x.reshape(shape)


def basis_contraction(
    x: Tensor, u: Tensor, basis: str | Basis, *, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The same sum for scores that are given: out[b,h,i,e] = Σ_j mask_ij φ(x_ij; u[:,j,e]).

    x (B,H,M,N), u and mask as in `basis_attention`. Meant for few keys: other implementations than the reference
    see it as basis attention with queries x and keys I, which costs N numbers more a score.
    """
    basis = parse_basis(basis) if isinstance(basis, str) else basis
    if impl == "reference":
        dtype = torch.promote_types(x.dtype, torch.float32)
        with reference.full_precision(x):
            return reference.contract(x.to(dtype), u.to(dtype), basis, mask).to(x.dtype)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape[:2], -1, -1)
    return basis_attention(x, eye, u, basis, scale=1.0, mask=mask, impl=impl)
