"""A product that all images share one factor of, lean in what it keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shared_product(w: Tensor, x: Tensor) -> Tensor:
    """w x for each image and head: w (H,R,N), x (B,H,N,D) -> (B,H,R,D).

    The same as `w @ x`. That one keeps what it multiplies, both factors copied for every image where they don't lie
    as a batch of matrices, and queries, keys and values, cut from one tensor, never do; this one keeps w and x.

    >>> w, x = torch.randn(3, 2, 5), torch.randn(4, 3, 5, 8)
    >>> torch.equal(shared_product(w, x), w @ x)
    True
    """
    if torch.is_grad_enabled() and (w.requires_grad or x.requires_grad):
        product: Tensor = _SharedProduct.apply(w, x)
        return product
    return w @ x


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return w @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, x = ctx.saved_tensors
        dw = dx = None
        if ctx.needs_input_grad[0]:
            dw = (grad.to(x.dtype) @ x.transpose(-2, -1)).sum(0).to(w.dtype)
        if ctx.needs_input_grad[1]:
            dx = (w.transpose(-2, -1) @ grad.to(w.dtype)).to(x.dtype)
        return dw, dx
