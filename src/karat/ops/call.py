"""One question to attention: queries, keys, and what is done to their scores."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """Scores that are not formed yet: q (B,H,M,D), k (B,H,N,D); bias and mask broadcastable to (B,H,M,N), or None."""

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    mask: Tensor | None = None

    def scores(self) -> Tensor:
        """scale · q kᵀ + bias: (B,H,M,N), in the queries' precision."""
        scores = self.q @ self.k.transpose(-2, -1) * self.scale
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)
