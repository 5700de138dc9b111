"""Learnable attention over sequences of any kind: of varying length, padded, or of another sequence (SPEC §9)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.models.tracing import one_node
from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator
from karat.operator.rules import OF_MODELS, refuse


class SequenceAttention(nn.Module):
    """Multi-head self-attention over sequences of at most N tokens, with a learnable operator instead of softmax.

    x (B,M,C) -> proj(concat_h σ_h(q_h k_hᵀ/√D) v_h), M <= N. What an operator learned belongs to positions: a shorter
    sequence uses the first M of them, and absent or padded keys add exactly nothing. To stretch what was learned over
    other lengths instead, call `karat.resample_operator(module.operator, N, new_N)`.

    Args:
        dim: C, a multiple of num_heads.
        num_heads: H.
        num_tokens: N, the longest sequence of keys.
        attention: a `KArAtConfig` or its short name.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout of σ's entries and of the output.

    Raises ValueError for sizes that don't fit, here and in `forward`.

    >>> layer = SequenceAttention(dim=32, num_heads=4, num_tokens=50, attention="g3b")
    >>> layer(torch.randn(2, 40, 32), lengths=torch.tensor([40, 17])).shape
    torch.Size([2, 40, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        attention: KArAtConfig | str = "g3b",
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.operator = _operator(dim, num_heads, num_tokens, attention)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    @one_node
    def forward(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B,M,C); lengths (B,) whole numbers of real tokens; mask boolean, (B,M) of keys or with four axes
        broadcastable to (B,H,M,M), True = may attend. Outputs at padded positions are there and mean nothing."""
        q, k, v = (_heads(part, self.operator.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out = _attend(self.operator, q, k, v, lengths, mask, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another: M queries, at most N keys, any M.

    x (B,M,C), context (B,K,C') -> proj(concat_h σ_h(q_h k_hᵀ/√D) v_h), K <= N. Only keys are indexed by the operator.
    Shorter and padded contexts as in `SequenceAttention`.

    Args:
        dim: C, a multiple of num_heads.
        num_heads: H.
        num_tokens: N, the longest context.
        attention: a `KArAtConfig` or its short name.
        context_dim: C'; None means C.
        qkv_bias, attn_drop, proj_drop: as in `SequenceAttention`.

    Raises ValueError for sizes that don't fit, here and in `forward`.

    >>> layer = CrossAttention(dim=32, num_heads=4, num_tokens=50, context_dim=24)
    >>> layer(torch.randn(2, 7, 32), torch.randn(2, 50, 24)).shape
    torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        attention: KArAtConfig | str = "g3b",
        *,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.operator = _operator(dim, num_heads, num_tokens, attention)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim if context_dim is None else context_dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    @one_node
    def forward(self, x: Tensor, context: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B,M,C), context (B,K,C'); lengths (B,) of the contexts; mask boolean, (B,K) of keys or with four axes
        broadcastable to (B,H,M,K), True = may attend."""
        H = self.operator.num_heads
        k, v = (_heads(part, H) for part in self.kv(context).chunk(2, dim=-1))
        out = _attend(
            self.operator, _heads(self.q(x), H), k, v, lengths, mask, self.attn_drop if self.training else 0.0
        )
        return self.proj_drop(self.proj(out))


def _operator(dim: int, num_heads: int, num_tokens: int, attention: KArAtConfig | str) -> KArAtOperator:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
    config = KArAtConfig.parse(attention)
    if config.is_softmax:
        raise ValueError("attention='softmax' has no operator; use torch.nn.MultiheadAttention, or name one, e.g. g3b")
    refuse(config, OF_MODELS, "a layer has no other blocks, and a sequence no grid of tokens; leave it out")
    return KArAtOperator(num_heads, num_tokens, config)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B,M,C) -> (B,H,M,D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(
    op: KArAtOperator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """σ(q kᵀ/√D) v over the keys that are there: (B,M,H·D)."""
    B, keys = k.shape[0], k.shape[2]
    absent = op.num_tokens - keys
    if absent < 0:
        raise ValueError(
            f"{keys} keys are more than the operator's {op.num_tokens} tokens; build it with num_tokens={keys} or "
            f"stretch it: karat.resample_operator(operator, {op.num_tokens}, {keys})"
        )
    mask = None if mask is None else _pairs(mask, (B, op.num_heads, q.shape[2], keys))
    if lengths is not None:
        if lengths.shape != (B,):
            raise ValueError(f"lengths must be one number a sequence, ({B},), got {tuple(lengths.shape)}")
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(
                f"lengths must count tokens in whole numbers, got {lengths.dtype}; write (share * {keys}).long() for "
                "shares of the longest, mask=... for a mask"
            )
        real = (torch.arange(keys, device=k.device) < lengths.to(k.device)[:, None])[:, None, None]
        mask = real if mask is None else mask & real
    if absent:
        present = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=k.device) if mask is None else mask
        mask = F.pad(present.expand(*present.shape[:-1], keys), (0, absent))
        k, v = (F.pad(part, (0, 0, 0, absent)) for part in (k, v))
    return op.attend(q, k, v, mask=mask, dropout_p=dropout_p).transpose(1, 2).flatten(2)


def _pairs(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask of keys (B,K), or one that broadcasts to (B,H,M,K) already, with four axes."""
    B, _, _, keys = shape
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = may attend), got {mask.dtype}")
    if mask.dim() == 2:
        if mask.shape != (B, keys):
            raise ValueError(
                f"a mask with two axes is one of keys, {(B, keys)}, got {tuple(mask.shape)}; of queries and keys, "
                "write mask[None, None]"
            )
        return mask[:, None, None]
    if mask.dim() != 4:
        remedy = "mask[:, None] for one mask a sequence" if mask.dim() == 3 else "all four"
        raise ValueError(
            f"mask must have two axes, {(B, keys)}, or four, {shape}, got {tuple(mask.shape)}; write {remedy}"
        )
    if any(have != 1 and have != want for have, want in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"mask {tuple(mask.shape)} must broadcast to {shape}; give each axis its size or 1")
    return mask
