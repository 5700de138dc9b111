"""The baseline: attention the way the paper computes it, every feature and σ materialised and kept by autograd.

For each head the score row is blown up to cos(mx) and sin(mx) for all m (B,H,M,F,N), contracted with the
coefficients, multiplied by W to σ (B,H,M,N), and by V. Peak memory grows with M·N·(2 + 3G) an image and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.operator import KArAtOperator
from karat.ops import basis_contraction


def attend(
    op: KArAtOperator, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **unused: object
) -> Tensor:
    """σ(q kᵀ) v in order W∘Φ by plain autograd: (B,H,M,D), (B,H,N,D), (B,H,N,D) -> (B,H,M,D).

    Raises ValueError for settings that this baseline doesn't have.
    """
    if (
        op.config.order != "WPhi"
        or op.softmax_heads
        or op.config.residual
        or any(x is not None for x in unused.values() if x != 0.0)
    ):
        raise ValueError("the materialising baseline knows order WPhi alone, without masks, bias, residual, dropout")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * factor
    layer = op.layers[0]
    hidden = basis_contraction(scores, layer.packed(), layer.basis, impl="reference")  # type: ignore[operator, arg-type]
    sigma = hidden if op.W is None else torch.einsum("bhkr,hnr->bhkn", hidden, op.W)
    return sigma @ v
