"""The one heavy operation: basis attention (SPEC §8), by its definition, tiled, and in kernels."""

from karat.ops.basis_attention import IMPLS, basis_attention, basis_contraction

__all__ = ["IMPLS", "basis_attention", "basis_contraction"]
