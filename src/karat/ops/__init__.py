"""The one heavy operation, basis attention (SPEC §8), alone and joint with softmax over the same scores (§10).

Each by its definition, tiled, and in kernels.
"""

from karat.ops.attend import attend
from karat.ops.basis_attention import basis_attention, basis_contraction, basis_sums
from karat.ops.call import Call
from karat.ops.checks import IMPLS
from karat.ops.joint_attention import joint_attention, joint_sums
from karat.ops.projector import Projector

__all__ = [
    "IMPLS",
    "Call",
    "Projector",
    "attend",
    "basis_attention",
    "basis_contraction",
    "basis_sums",
    "joint_attention",
    "joint_sums",
]
