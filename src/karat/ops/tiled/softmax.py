"""Softmax over the scores of the tiles, for the tiled implementation: a running maximum forward, P again backward.

Scores are (heads·images, m, n) here, whichever way they lie in memory; `drop` says where a pair takes no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.ops.softmax_part import SoftmaxPart
from karat.ops.tiled.tiling import Tile


class RunningSoftmax:
    """softmax(S) v while tiles go by, keys innermost."""

    top: Tensor  # of the queries that are under way: the maximum so far, Σ_j exp(S_j - top), and the same times v_j
    total: Tensor
    sums: Tensor

    def __init__(self, part: SoftmaxPart) -> None:
        self.part = part
        self.v = part.v.transpose(0, 1).to(part.logsumexp.dtype)
        part.see_nothing()  # there may be no tile at all

    def add(self, tile: Tile, scores: Tensor, drop: Tensor | None) -> None:
        """Take the scores of one tile in."""
        if drop is not None:
            scores = scores.unflatten(0, tile.pairs).masked_fill(drop, -torch.inf).flatten(0, 1)
        top = scores.amax(-1, keepdim=True)
        first = tile.keys.start == 0
        if not first:
            top = torch.maximum(top, self.top)
        start = top.masked_fill(top == -torch.inf, 0)  # rows without a key so far
        weights = (scores - start).exp_()
        total, sums = weights.sum(-1, keepdim=True), torch.bmm(weights, tile.rows(self.v, tile.keys))
        if not first:
            shrink = (self.top - start).exp_()
            total, sums = total.addcmul_(self.total, shrink), sums.addcmul_(self.sums, shrink)
        self.top, self.total, self.sums = top, total, sums
        if tile.keys.stop == self.v.shape[2]:
            heads, images = tile.pairs
            results = [x.unflatten(0, (heads, images)).transpose(0, 1) for x in (sums, total, top)]
            self.part.finish((tile.images, tile.heads, tile.queries), *results)


class SoftmaxGradients:
    """dV, and what the softmax sends to the scores."""

    def __init__(self, part: SoftmaxPart) -> None:
        assert part.grad is not None
        dtype = part.logsumexp.dtype
        self.v, self.grad = (x.transpose(0, 1).to(dtype) for x in (part.v, part.grad))
        self.delta, self.logsumexp = part.delta().transpose(0, 1), part.logsumexp.unsqueeze(-1).transpose(0, 1)
        self.result = part.dv
        self.dv = None if part.dv is None else torch.zeros_like(part.dv, dtype=dtype)

    def add(self, tile: Tile, scores: Tensor, drop: Tensor | None, dscores: Tensor) -> Tensor:
        """The scores' gradient of one tile, given that of basis attention, which may be overwritten."""
        grad, v = tile.rows(self.grad, tile.queries), tile.rows(self.v, tile.keys)
        probabilities = (scores - tile.rows(self.logsumexp, tile.queries)).exp_()
        if drop is not None:
            probabilities.unflatten(0, tile.pairs).masked_fill_(drop, 0)
        if self.dv is not None:
            part = torch.bmm(probabilities.transpose(1, 2), grad)
            self.dv.transpose(0, 1)[tile.heads, tile.images, tile.keys] += part.unflatten(0, tile.pairs)
        own = torch.bmm(grad, v.transpose(1, 2)).sub_(tile.rows(self.delta, tile.queries))
        return dscores.addcmul_(probabilities, own)

    def finish(self) -> None:
        """Write dV."""
        if self.result is not None and self.dv is not None:
            self.result.copy_(self.dv)
