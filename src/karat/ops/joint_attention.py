"""The front door of joint attention: softmax attention and basis attention over the same scores, in one pass."""

from __future__ import annotations

from torch import Tensor

from karat.basis import Basis
from karat.ops import joint_library, reference
from karat.ops.checks import checked


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
    score_gradient: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the sums of basis attention, from scores that are computed once (SPEC §10).

    attended = softmax(S) v,  sums[b,h,i,e] = Σ_j mask_ij φ(S_ij; u[b or 1,h,:,j,e]),  S = scale·qkᵀ + bias: what
    softmax attention and `karat.basis_attention` give, tile by tile with the running maximum of the softmax beside the
    sums. The backward pass computes the scores again, once for both, and

        dS = P ∘ (dO Vᵀ - δ) + score_gradient · Σ_f ψ_f'(S) ∘ (dΦ U_fᵀ)

    with the softmax's P, δ its rows' Σ_j P ∘ (dO Vᵀ), dO and dΦ the gradients of the two results.

    Args:
        q: queries (B,H,M,D).
        k: keys (B,H,N,D).
        v: values (B,H,N,Dv), of k's dtype.
        u, basis, scale, bias: as in `karat.basis_attention`.
        mask: boolean, broadcastable to (B,H,M,N); a pair that is False takes part in neither. Rows that see no key
            give zero.
        score_gradient: factor of what the sums send to q, k and bias; it changes no value and no gradient of u.
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
    inputs = checked(q, k, v, u, basis, scale, bias, mask, impl)
    q, k, basis, factor, bias, mask = inputs.q, inputs.k, inputs.basis, inputs.scale, inputs.bias, inputs.mask
    assert inputs.v is not None
    if impl == "reference":
        with reference.full_precision(q):
            return reference.joint_attention(q, k, inputs.v, u, basis, factor, bias, mask, score_gradient)
    return joint_library.joint_attention(
        q, k, inputs.v, u, bias, mask, str(basis), factor, float(score_gradient), impl
    )[:2]
