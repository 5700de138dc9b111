"""Attention over a grid of tokens, a window's or a whole image's, with masked padding and relative positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.models.attention import AttentionInputs, TokenAttention
from karat.models.backbones import kind_of
from karat.operator.grids import on_grid
from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import TokenGrid
from karat.ops.masks import softmax_attention


class GridAttention(TokenAttention):
    """Multi-head attention of the tokens of a grid: proj(concat_h σ_h(scale·q_h k_hᵀ + positions) v_h).

    Takes over the parts of a timm `Attention` (σ is softmax) or a `KArAtAttention` (σ is its operator): projections,
    dropouts, and, where they're there, norms and gate.

    With relative positions the score of query i and key j gains q_i·R^h[y_i − y_j] + q_i·R^w[x_i − x_j], two tables
    (2·side − 1, D) that start at zero (Li et al., ViTDet, arXiv 2203.16527; MViTv2). The sum is written as a longer
    product: q_i is extended by its h + w products with the tables, k_j by two one-hot vectors. So nothing of size N×N
    is kept for it, and any order of the operator takes it.

    Args:
        attn: the attention to take over.
        grid: (height, width) of the tokens.
        base: the grid that a shared operator lives on, where it isn't `grid`.
        relative: whether to add relative positions.

    Raises ValueError for an attention with a `position_bias`.
    """

    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "norm", "gate")

    def __init__(self, attn: Any, grid: tuple[int, int], base: tuple[int, int], relative: bool = False) -> None:
        super().__init__(attn)
        if getattr(attn, "position_bias", None) is not None:
            raise ValueError(
                "position_bias='relative' belongs to a classifier's grid; a detector has relative positions of its "
                "own: leave the option out and give --rel-pos"
            )
        self.grid = grid
        self.operator: KArAtOperator | None = None
        self.grids = TokenGrid(0, *grid), TokenGrid(0, *grid)  # the operator's, and the tokens' here
        kind = kind_of(attn)
        if kind is not None and kind.learned:
            op = attn.operator
            if "operator" in attn._modules:
                self.operator = op
            else:  # shared: registered once, on the model, as in karat.models.attention
                self.__dict__["operator"] = op
                self.grids = TokenGrid(0, *base), TokenGrid(0, *grid)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if relative:
            width = self.qkv.out_features // (3 * self.num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, width))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, width))

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        q, k, v, scale, bias, mask = inputs
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            q, k = with_positions(q, k, scale, self.rel_pos_h, self.rel_pos_w)
            scale = 1.0
        if self.operator is None:
            return softmax_attention(q, k, v, scale, bias, mask, self._dropout)
        op = on_grid(self.operator, *self.grids)  # a shared one is resampled here, and its gradients reach it (SPEC §9)
        return op.attend(q, k, v, scale=scale, bias=bias, mask=mask, dropout_p=self._dropout)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, relative={self.rel_pos_h is not None}"


def with_positions(q: Tensor, k: Tensor, scale: float, table_h: Tensor, table_w: Tensor) -> tuple[Tensor, Tensor]:
    """(q', k') of width D + h + w with q'·k' = scale · q·k + q·R^h[y_q − y_k] + q·R^w[x_q − x_k].

    Args:
        q, k: (B,H,N,D), tokens row by row.
        table_h, table_w: (2h−1,D) and (2w−1,D); entry d + side − 1 is that of the difference d.
    """
    (height, width), dtype = ((len(table) + 1) // 2 for table in (table_h, table_w)), q.dtype
    y, x = (torch.arange(side, device=q.device) for side in (height, width))
    rows = table_h[y[:, None] - y[None, :] + height - 1].to(dtype)  # (h of the query, h of the key, D)
    columns = table_w[x[:, None] - x[None, :] + width - 1].to(dtype)
    image = q.unflatten(2, (height, width))  # (B,H,h,w,D)
    by_row = torch.einsum("bnhwd,hkd->bnhwk", image, rows).flatten(2, 3)
    by_column = torch.einsum("bnhwd,wkd->bnhwk", image, columns).flatten(2, 3)
    here_h = F.one_hot(y, height).to(dtype)[:, None].expand(height, width, height).flatten(0, 1)
    here_w = F.one_hot(x, width).to(dtype)[None].expand(height, width, width).flatten(0, 1)
    marks = torch.cat([here_h, here_w], -1).expand(*k.shape[:3], height + width)
    return torch.cat([q * scale, by_row, by_column], -1), torch.cat([k, marks], -1)
