"""What an operator's edge functions are given: the scores, or softmax's probabilities, and what gradient comes back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from karat.ops.masks import safe_softmax


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


def relative_probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(scores) times the number of keys that the row may see, (B,H,M,N): uniform attention is 1.

    Exactly zero for masked pairs.

    >>> relative_probabilities(torch.zeros(1, 1, 1, 4), torch.tensor([[[[True, True, False, True]]]]))
    tensor([[[[1., 1., 0., 1.]]]])
    """
    count: Tensor | int = scores.shape[-1]
    if mask is not None:
        mask = mask.expand(*mask.shape[:3], scores.shape[-1])
        count = mask.sum(-1, keepdim=True)
    return safe_softmax(scores, mask) * count


def probabilities_as_products(seen: Products, mask: Tensor | None) -> Products:
    """`relative_probabilities` of seen queries and keys, as queries of their own beside unit vectors as keys.

    So every order of the operator, streamed or not, takes them as it takes scores; N×N numbers an image and head.
    """
    scores = seen.scores()
    P = relative_probabilities(scores.to(torch.promote_types(scores.dtype, torch.float32)), mask).to(seen.q.dtype)
    unit = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    return Products(P, unit.expand(*P.shape[:2], -1, -1), 1.0, None)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient comes back multiplied by `factor`.

    >>> x = torch.ones(2, requires_grad=True)
    >>> torch.autograd.grad(scale_gradient(x, 0.5).sum(), x)
    (tensor([0.5000, 0.5000]),)
    """
    if factor == 1.0 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if factor == 0.0:
        return x.detach()
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
