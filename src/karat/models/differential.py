"""timm's `DiffAttention` in the place of a ViT's attention (Ye et al. 2024, arXiv 2410.05258)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DiffAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from karat.models.attention import Intermediate, split_mask
from karat.ops.masks import as_mask, safe_softmax


class DifferentialAttention(DiffAttention):
    """σ = softmax(A₁) − λ softmax(A₂), A₁ and A₂ the scores of the halves of a head; after σ v a norm of each head.

    λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + 0.8 − 0.6 e^(−0.3 l) in block l, its vectors learned. qkv, projection,
    dropouts and inner norm are taken over from `attn`, so their names and values stay.

    Raises ValueError for an attention that isn't timm's for ViTs, has norms of queries and keys or a gate, or heads of
    an odd width.
    """

    def __init__(self, attn: Any, depth: int) -> None:
        if type(attn) is not Attention or attn.proj.out_features != attn.qkv.in_features:
            raise ValueError(
                f"attention=diff takes the place of a ViT's or DeiT's attention, not of {type(attn).__name__}"
            )
        if not isinstance(attn.q_norm, nn.Identity) or getattr(attn, "gate", None) is not None:
            raise ValueError("attention=diff halves queries and keys, and this model has norms of them, or gates")
        if attn.head_dim % 2 or attn.qkv.out_features != 3 * attn.proj.out_features:
            raise ValueError(f"attention=diff halves each head, and these are {attn.head_dim} wide: take an even width")
        weight, dim = attn.qkv.weight, attn.qkv.in_features
        super().__init__(dim, attn.num_heads, depth=depth, device=weight.device, dtype=weight.dtype)
        for name in ("qkv", "proj", "attn_drop", "proj_drop", "norm"):
            setattr(self, name, getattr(attn, name))
        self.attn_drop_p = attn.attn_drop.p if isinstance(attn.attn_drop, nn.Dropout) else 0.0
        self.train(attn.training)


def differential(attn: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Intermediate:
    """A₁ and σ (B,H,N,N) of tokens x (B,N,C)."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, 2, -1)).permute(2, 4, 0, 3, 1, 5).unbind(0)
    scores = q @ k.transpose(-2, -1) * attn.scale  # (2,B,H,N,N)
    bias, mask = split_mask(attn_mask)
    if is_causal:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    mask = as_mask(mask)
    scores = scores if bias is None else scores + bias
    first, second = (safe_softmax(part, mask) for part in scores)
    return Intermediate(scores[0], first - attn._compute_lambda().type_as(q) * second, mask)
