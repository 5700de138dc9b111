"""The baseline: attention the way the paper computes it, every feature and σ materialised and kept by autograd.

For each head the score row is blown up to cos(mx) and sin(mx) for all m (B,H,M,F,N), contracted with the
coefficients, multiplied by W to σ (B,H,M,N), and by V. Peak memory grows with M·N·(2 + 3G) an image and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator
from karat.ops import basis_contraction


def missing(config: KArAtConfig) -> list[str]:
    """What a configuration asks for and this baseline doesn't have; empty if it can compute it."""
    absent = ("simplex", "residual", "softmax_heads", "position")
    found = [name for name in absent if getattr(config, name)]
    found += [f"order={config.order}"] if config.order != "WPhi" else []
    return found if config.has_edges else [config.basis, *found]


def attend(
    op: KArAtOperator, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **unused: object
) -> Tensor:
    """σ(q kᵀ) v in order W∘Φ by plain autograd: (B,H,M,D), (B,H,N,D), (B,H,N,D) -> (B,H,M,D).

    Raises ValueError for settings that this baseline doesn't have.
    """
    asked = [name for name, x in unused.items() if x is not None and (isinstance(x, Tensor) or x != 0.0)]
    asked += missing(op.config)
    if asked:
        raise ValueError(
            f"the materialising baseline can't do {', '.join(asked)}: it knows order WPhi alone, without masks, bias, "
            "dropout, simplex, residual, softmax heads, or any other change of what the edges see or give"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * factor
    layer = op.edge_layers[0]
    hidden = basis_contraction(scores, layer.packed(), layer.basis, impl="reference")
    sigma = hidden if op.projector is None else torch.einsum("bhkr,hnr->bhkn", hidden, op.projector)
    return sigma @ v
