"""The one heavy operation, basis attention (SPEC §8), alone and joint with softmax over the same scores (§10).

Each by its definition, tiled, and in kernels.
"""

from torch import Tensor

from karat.basis import Basis
from karat.ops.basis_attention import basis_attention, basis_contraction
from karat.ops.call import Call
from karat.ops.checks import IMPLS
from karat.ops.joint_attention import joint_attention

__all__ = ["IMPLS", "Call", "basis_attention", "basis_contraction", "basis_sums", "joint_attention", "joint_sums"]


def basis_sums(call: Call, u: Tensor, basis: Basis, impl: str = "auto") -> Tensor:
    """`basis_attention` of a call: (B,H,M,E)."""
    q, k, scale, bias, mask = call
    return basis_attention(q, k, u, basis, scale=scale, bias=bias, mask=mask, impl=impl)


def joint_sums(call: Call, v: Tensor, u: Tensor, basis: Basis, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`joint_attention` of a call: (B,H,M,Dv), (B,H,M,E)."""
    q, k, scale, bias, mask = call
    return joint_attention(q, k, v, u, basis, scale=scale, bias=bias, mask=mask, impl=impl)
