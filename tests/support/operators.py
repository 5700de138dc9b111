"""Sizes, inputs and the written-out sum that the operators' tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from karat import KArAtOperator

B, H, N, D = 2, 2, 6, 5


def make_mask(kind: str, n: int = N) -> Tensor | None:
    shape = {"none": None, "keys": (B, 1, 1, n), "pairs": (B, 1, n, n)}[kind]
    return None if shape is None else torch.rand(shape) > 0.3


def layer_sum(op: KArAtOperator, x: Tensor, layer: int, mask: Tensor | None = None) -> Tensor:
    """Σ_q φ_pq(x_q), head by head: (B,H,M,Q) -> (B,H,M,P)."""
    heads = []
    for h in range(x.shape[1]):
        edges = op.edges(x[:, h], layer)[..., h, :, :]  # (B,M,Q of x,P,Q)
        edges = edges.diagonal(dim1=2, dim2=4)  # (B,M,P,Q)
        if mask is not None:
            edges = torch.where(mask[:, h].unsqueeze(2), edges, 0)
        heads.append(edges.sum(-1))
    return torch.stack(heads, dim=1)


def qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return torch.randn(3, B, H, N, D, dtype=dtype).unbind()


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


class Attend(torch.nn.Module):
    def __init__(self, op: KArAtOperator) -> None:
        super().__init__()
        self.op = op

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.op.attend(q, k, v)
