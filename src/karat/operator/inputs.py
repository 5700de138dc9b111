"""What an operator's edge functions are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Products(NamedTuple):
    """Scores that are not formed yet: queries (B,H,M,D), keys (B,H,N,D), bias broadcastable to (B,H,M,N) or None."""

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None

    def scores(self) -> Tensor:
        """scale · q kᵀ + bias: (B,H,M,N), in the queries' precision."""
        scores = self.q @ self.k.transpose(-2, -1) * self.scale
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)
