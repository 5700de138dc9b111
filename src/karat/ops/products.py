"""Products of an attention's last step, (B,H,·,·) each, lean in memory.

`w @ x` does the same, but keeps for the backward pass what it multiplies: both factors copied for every image where
they don't lie as a batch of matrices, and values, cut from the tensor of queries, keys and values, never do. The
copies it makes and drops on the way also leave holes in the process's memory that later tensors don't fit into. On
a CPU the heads are therefore done one after the other, each a batch of matrices where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from karat.ops.transforms import looked_through


def shared_product(w: Tensor, x: Tensor) -> Tensor:
    """w x for each image and head, w shared by the images: w (H,R,N), x (B,H,N,D) -> (B,H,R,D).

    >>> w, x = torch.randn(3, 2, 5), torch.randn(4, 3, 5, 8)
    >>> torch.allclose(shared_product(w, x), w @ x, atol=1e-6)
    True
    """
    if not _recorded(w, x):
        return w @ x
    product: Tensor = _SharedProduct.apply(w, x)
    return product


def product_for_tokens(h: Tensor, x: Tensor) -> Tensor:
    """h x for each image and head, (B,H,M,R) (B,H,R,D) -> (B,H,M,D), on a CPU laid out as (B,M,H,D).

    That's the order in which a model joins its heads, and in which fused softmax attention gives its output.

    >>> h, x = torch.randn(4, 3, 6, 2), torch.randn(4, 3, 2, 8)
    >>> torch.allclose(product_for_tokens(h, x), h @ x, atol=1e-6)
    True
    """
    if not _recorded(h, x) or h.dtype != x.dtype or not _head_by_head(x, x.dtype):
        return h @ x
    product: Tensor = _ProductForTokens.apply(h, x)
    return product


def _recorded(*factors: Tensor) -> bool:
    """Whether autograd alone keeps what is multiplied; compilers, torch.func and forward mode have their own ways."""
    if torch.compiler.is_compiling() or looked_through(*factors):
        return False
    return torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)


def _head_by_head(x: Tensor, precision: torch.dtype | None = None) -> bool:
    # On a GPU many small launches would cost more than a copy. Autocast has its own say in the precision, unless that
    # is what both factors have already.
    if x.device.type != "cpu" or 0 in x.shape:
        return False
    return not torch.is_autocast_enabled("cpu") or precision == torch.get_autocast_dtype("cpu")


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        if not _head_by_head(x):
            return w @ x
        return torch.stack([torch.bmm(_per_image(w_h, x_h), x_h) for w_h, x_h in zip(w, x.unbind(1), strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, x = ctx.saved_tensors
        wants_w, wants_x = ctx.needs_input_grad
        grad_x, grad_w = grad.to(x.dtype), grad.to(w.dtype)
        dw = dx = None
        if not _head_by_head(x):
            dw = (grad_x @ x.transpose(-2, -1)).sum(0).to(w.dtype) if wants_w else None
            dx = (w.transpose(-2, -1) @ grad_w).to(x.dtype) if wants_x else None
            return dw, dx
        if wants_w:
            parts = zip(grad_x.unbind(1), x.unbind(1), strict=True)
            dw = torch.stack([torch.bmm(g, x_h.transpose(1, 2)).sum(0) for g, x_h in parts]).to(w.dtype)
        if wants_x:
            heads = zip(w, grad_w.unbind(1), strict=True)
            dx = torch.stack([torch.bmm(_per_image(w_h.t(), g), g) for w_h, g in heads], 1).to(x.dtype)
        return dw, dx


def _per_image(w: Tensor, x: Tensor) -> Tensor:
    """w (R,N) for a batch x (B,·,·): (B,R,N), not copied."""
    return w.expand(len(x), -1, -1)


class _ProductForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(h, x)
        B, H, M, _ = h.shape
        out = h.new_empty(B, M, H, x.shape[-1])
        for head in range(H):
            torch.bmm(h[:, head], x[:, head], out=out[:, :, head])
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, x = ctx.saved_tensors
        wants_h, wants_x = ctx.needs_input_grad
        heads = list(zip(h.unbind(1), x.unbind(1), grad.unbind(1), strict=True))
        dh = torch.stack([torch.bmm(g, x_h.transpose(1, 2)) for _, x_h, g in heads], 1) if wants_h else None
        dx = torch.stack([torch.bmm(h_h.transpose(1, 2), g) for h_h, _, g in heads], 1) if wants_x else None
        return dh, dx
