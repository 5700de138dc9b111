"""The front door of joint attention: softmax attention and basis attention over the same scores, in one pass."""

from __future__ import annotations

from torch import Tensor

from karat.basis import Basis
from karat.ops import library, reference
from karat.ops.call import Call
from karat.ops.checks import call_of, checked


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    basis: str | Basis,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the sums of basis attention, from scores that are computed once (SPEC §10).

    attended = softmax(S) v,  sums[b,h,i,e] = Σ_j mask_ij φ(S_ij; u[b or 1,h,:,j,e]),  S = scale·qkᵀ + bias: what
    softmax attention and `karat.basis_attention` give, tile by tile with the running maximum of the softmax beside the
    sums. The backward pass computes the scores again, once for both, and

        dS = P ∘ (dO Vᵀ - δ) + Σ_f ψ_f'(S) ∘ (dΦ U_fᵀ)

    with the softmax's P, δ its rows' Σ_j P ∘ (dO Vᵀ), dO and dΦ the gradients of the two results.

    Args:
        q: queries (B,H,M,D).
        k: keys (B,H,N,D).
        v: values (B,H,N,Dv), of k's dtype.
        u, basis, scale, bias: as in `karat.basis_attention`.
        mask: boolean, broadcastable to (B,H,M,N); a pair that is False takes part in neither. Rows that see no key
            give zero.
        impl: as in `karat.basis_attention`.

    Returns:
        attended (B,H,M,Dv), laid out as (B,M,H,Dv), the order in which a model joins its heads, except from
        impl="reference", and sums (B,H,M,E), both in q's dtype.

    Raises:
        ValueError: as `karat.basis_attention`.

    >>> import torch
    >>> q, k, v, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    >>> attended, sums = joint_attention(q, k, v, u, "fourier(grid=3)")
    >>> attended.shape, sums.shape
    (torch.Size([2, 3, 5, 8]), torch.Size([2, 3, 5, 4]))
    """
    return joint_sums(call_of(q, k, scale, bias, mask), v, u, basis, impl)


def joint_sums(call: Call, v: Tensor, u: Tensor, basis: str | Basis, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`joint_attention` of a call: attended (B,H,M,Dv) and the sums (B,H,M,E)."""
    call, values, basis, impl = checked(call, v, u, basis, impl)
    assert values is not None
    if impl == "reference":
        with reference.full_precision(call.q):
            return reference.joint_attention(call, values, u, basis)
    q, k, scale, bias, mask = call
    attended, sums, _ = library.joint_attention(q, k, values, u, bias, mask, basis, scale, impl)
    return attended, sums
