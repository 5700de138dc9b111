"""The one heavy operation, basis attention (SPEC §8), alone and joint with softmax over the same scores (§10).

Each by its definition, tiled, and in kernels.
"""

from karat.ops.basis_attention import basis_attention, basis_contraction
from karat.ops.checks import IMPLS
from karat.ops.joint_attention import joint_attention

__all__ = ["IMPLS", "basis_attention", "basis_contraction", "joint_attention"]
