"""Two freedoms of softmax attention that don't change it and do matter to an operator: where scores lie, how large.

Softmax ignores what all scores of a row share, so the key bias may be anything; here it's chosen so that rows are
centred as nearly as one vector can. And an operator's functions tell scores apart within a reach only (half a Fourier
period, a spline's grid): the queries are scaled so that the scores fill a share of it. Both are folded into the
student's own qkv weights; nothing is added to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from karat.models.attention import AttentionInputs

QUANTILE = 0.999
LARGEST_SAMPLE = 1 << 22  # torch.quantile takes no more than 2²⁴ numbers


def can_fold(attn: Any) -> bool:
    """Whether queries and keys come out of qkv as they are, without norms behind it."""
    norms = (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
    return isinstance(attn.qkv, nn.Linear) and all(norm is None or isinstance(norm, nn.Identity) for norm in norms)


def key_shift(batches: list[AttentionInputs]) -> Tensor:
    """b (H,D) that minimises E (q·(k̄ + b))², k̄ the mean key of the image: centred rows of scores."""
    gram: Any = 0.0
    cross: Any = 0.0
    for inputs in batches:
        q, mean = inputs.q.double(), inputs.k.double().mean(2)  # (B,H,M,D), (B,H,D)
        qq = torch.einsum("bhmd,bhme->bhde", q, q)
        gram = gram + qq.sum(0)
        cross = cross + torch.einsum("bhde,bhe->hd", qq, mean)
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    shift: Tensor = -torch.linalg.solve(gram + 1e-6 * size * eye, cross.unsqueeze(-1)).squeeze(-1)
    return shift


def score_scale(batches: list[AttentionInputs], reach: float) -> Tensor:
    """(H,) by which scores are to be multiplied so that their 99.9 % quantile lies at the reach."""
    sizes = []
    for inputs in batches:
        scores = inputs.scores.transpose(0, 1).flatten(1).abs()  # (H, numbers)
        step = -(-scores.shape[1] // LARGEST_SAMPLE)
        sizes.append(torch.quantile(scores[:, ::step].float(), QUANTILE, dim=1))
    return reach / torch.stack(sizes).mean(0).clamp(min=1e-6)


def _rows(attn: Any, part: int, x: Tensor) -> Tensor:
    """A view (H,D,...) of the rows of qkv that make queries (0) or keys (1)."""
    return x.unflatten(0, (3, attn.num_heads, -1))[part]


@torch.no_grad()
def shift_keys(attn: Any, shift: Tensor, heads: list[int]) -> None:
    """Add shift (H,D) to the key bias of some heads. Does nothing where qkv has no bias."""
    if attn.qkv.bias is not None:
        _rows(attn, 1, attn.qkv.bias)[heads] += shift[heads].to(attn.qkv.bias)


@torch.no_grad()
def scale_queries(attn: Any, scale: Tensor, heads: list[int]) -> None:
    """Multiply the scores of some heads by scale (H,): queries, and Swin's position biases."""
    weight, bias = attn.qkv.weight, attn.qkv.bias
    factor = scale.to(weight)
    _rows(attn, 0, weight)[heads] *= factor[heads, None, None]
    if bias is not None:
        _rows(attn, 0, bias)[heads] *= factor[heads, None]
    table = getattr(attn, "relative_position_bias_table", None)
    if table is not None:
        table[:, heads] *= factor[heads]
