"""Euclidean projection onto the probability simplex, in operations that compile and export.

(The tests hold it against entmax's sparsemax, whose autograd function torch.compile can't trace.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def simplex_projection(y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The point of {x >= 0, Σx = 1} nearest to y, along the last axis (SPEC §1; Condat 2016; sparsemax).

    x_i = max(y_i - τ, 0) with the τ that makes the sum one: τ = (Σ_{i<=k} y_(i) - 1)/k over the k largest entries,
    k the largest with 1 + k y_(k) > Σ_{i<=k} y_(i). `mask` (boolean, broadcastable to y): only its True entries take
    part, the others are exactly zero, as is a row without any.

    >>> simplex_projection(torch.tensor([2.0, 1.5, -3.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    values = y.to(torch.promote_types(y.dtype, torch.float32))
    if mask is None:
        return _project(values).to(y.dtype)
    return torch.where(mask, _project(lowered(values, mask)), 0).to(y.dtype)


def lowered(values: Tensor, mask: Tensor) -> Tensor:
    """Masked entries two below the largest other: outside the support, as τ >= max - 1 (entmax15: 2τ >= max - 2), and
    finite."""
    largest = values.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return torch.where(mask, values, torch.where(largest.isfinite(), largest, 0) - 2)


def _project(y: Tensor) -> Tensor:
    y = y - y.detach().amax(-1, keepdim=True)  # moves τ along; sums of large entries would lose digits
    largest_first = y.sort(dim=-1, descending=True).values
    sums = largest_first.cumsum(-1)
    places = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    size = (1 + places * largest_first > sums).sum(-1, keepdim=True)  # a prefix: k is its length
    threshold = (sums.gather(-1, size - 1) - 1) / size
    return (y - threshold).clamp(min=0)
