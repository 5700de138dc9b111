"""Softmax and masks: rows without any key, and masks whose rows are of few kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many keys forming σ is cheaper than one product with v for each kind of row.
FEWEST_KEYS = 128
MOST_PATTERNS = 4


def safe_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax over the keys that the mask allows, (B,H,M,N); exactly zero elsewhere and in rows that allow none."""
    if mask is None:
        return scores.softmax(-1)
    mask = mask.expand(*mask.shape[:3], scores.shape[-1])
    reachable = mask.any(-1, keepdim=True)
    lowered = torch.where(mask | ~reachable, scores, -torch.inf)  # no row is all -inf: NaN never arises
    return torch.where(mask, lowered.softmax(-1), 0)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v through PyTorch's fused attention; rows that may see no key give zero."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_fitting(bias, q, k), dropout_p=dropout_p, scale=scale)
    mask = mask.expand(*mask.shape[:3], k.shape[2])
    reachable = mask.any(-1, keepdim=True)
    open_rows = mask | ~reachable
    attn_mask = open_rows if bias is None else torch.where(open_rows, bias, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_fitting(attn_mask, q, k), dropout_p=dropout_p, scale=scale)
    return torch.where(reachable, out, 0)


def _fitting(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """An additive mask in q's precision, its last axes whole."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)


def row_patterns(mask: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """The few kinds of rows that a mask of pairs (B,H,M,N) has, as in shifted windows, where they're at most four.

    Returns [(which rows (B,H,M,1), which keys they see (B,H,N,1)), ...]; None if there are more than four kinds,
    if N is so small that forming σ is cheaper, or while compiling (it depends on the data).
    """
    if mask.shape[-1] <= FEWEST_KEYS or torch.compiler.is_compiling():
        return None
    pending = torch.ones(mask.shape[:3], dtype=torch.bool, device=mask.device)
    patterns = []
    for _ in range(MOST_PATTERNS):
        first = pending.int().argmax(-1)[..., None, None].expand(*mask.shape[:2], 1, mask.shape[-1])
        keys = mask.gather(2, first)  # (B,H,1,N): the first row not yet taken
        member = pending & (mask == keys).all(-1)
        patterns.append((member.unsqueeze(-1), keys.transpose(-2, -1)))
        pending = pending & ~member
        if not pending.any():
            return patterns
    return None
