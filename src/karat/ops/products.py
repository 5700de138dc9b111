"""Products of an attention's last step, (B,H,·,·) each, lean in memory.

`w @ x` does the same, but keeps for the backward pass what it multiplies: both factors copied for every image where
they don't lie as a batch of matrices, and values, cut from the tensor of queries, keys and values, never do. The
copies it makes and drops on the way also leave holes in the process's memory that later tensors don't fit into. On
a CPU the heads are therefore done one after the other, each a batch of matrices where it lies. With few tokens the
calls would cost more than the copies: all heads are done at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from karat.ops.transforms import looked_through

FEW_TOKENS = 96  # found by measurement, between 65 and 197


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


def low_rank_product(h: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """h (wᵀ x) for each image and head, w shared by the images: (B,H,M,R), (H,N,R), (B,H,N,D) -> (B,H,M,D).

    On a CPU laid out as (B,M,H,D), see `product_for_tokens`.

    >>> h, w, x = torch.randn(4, 3, 6, 2), torch.randn(3, 5, 2), torch.randn(4, 3, 5, 8)
    >>> torch.allclose(low_rank_product(h, w, x), h @ (w.transpose(-2, -1) @ x), atol=1e-6)
    True
    """
    few = max(h.shape[2], x.shape[2]) <= FEW_TOKENS and h.dtype == w.dtype == x.dtype
    if few and _recorded(h, w, x) and _head_by_head(x, x.dtype) and h.numel():
        product: Tensor = _LowRankProduct.apply(h, w, x)
        return product
    return product_for_tokens(h, shared_product(w.transpose(-2, -1), x))


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


def _images_together(x: Tensor) -> Tensor:
    """(B,H,N,D) as (H,N,B·D), copied: one product a head serves all images."""
    B, H, N, D = x.shape
    return x.permute(1, 2, 0, 3).reshape(H, N, B * D)


def _images_apart(x: Tensor, width: int) -> Tensor:
    """(H,N,B·D) as (B,H,N,D), not copied."""
    return x.reshape(*x.shape[:2], x.shape[2] // width, width).permute(2, 0, 1, 3)


def shared_forward(w: Tensor, x: Tensor) -> Tensor:
    """`shared_product`, unrecorded."""
    if not _head_by_head(x):
        return w @ x
    if x.shape[2] <= FEW_TOKENS:
        return _images_apart(torch.bmm(w, _images_together(x)), x.shape[3])
    return torch.stack([torch.bmm(_per_image(w_h, x_h), x_h) for w_h, x_h in zip(w, x.unbind(1), strict=True)], 1)


def shared_backward(
    grad: Tensor, w: Tensor, x: Tensor, wants_w: bool, wants_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of w and x, given that of `shared_product`."""
    grad_x, grad_w = grad.to(x.dtype), grad.to(w.dtype)
    dw = dx = None
    if not _head_by_head(x):
        dw = (grad_x @ x.transpose(-2, -1)).sum(0).to(w.dtype) if wants_w else None
        dx = (w.transpose(-2, -1) @ grad_w).to(x.dtype) if wants_x else None
        return dw, dx
    if wants_w and x.shape[2] <= FEW_TOKENS:
        dw = torch.bmm(_images_together(grad_x), _images_together(x).transpose(1, 2)).to(w.dtype)
    elif wants_w:
        parts = zip(grad_x.unbind(1), x.unbind(1), strict=True)
        dw = torch.stack([torch.bmm(g, x_h.transpose(1, 2)).sum(0) for g, x_h in parts]).to(w.dtype)
    if wants_x:
        dx = _images_apart(torch.bmm(w.transpose(1, 2), _images_together(grad_w)), x.shape[3]).to(x.dtype)
    return dw, dx


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return shared_forward(w, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return shared_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


def _per_image(w: Tensor, x: Tensor) -> Tensor:
    """w (R,N) for a batch x (B,·,·): (B,R,N), not copied."""
    return w.expand(len(x), -1, -1)


def tokens_forward(h: Tensor, x: Tensor) -> Tensor:
    """`product_for_tokens`, unrecorded."""
    if h.dtype != x.dtype or not _head_by_head(x, x.dtype):
        return h @ x
    B, H, M, _ = h.shape
    out = h.new_empty(B, M, H, x.shape[-1])
    for head in range(H):
        torch.bmm(h[:, head], x[:, head], out=out[:, :, head])
    return out.transpose(1, 2)


def tokens_backward(
    grad: Tensor, h: Tensor, x: Tensor, wants_h: bool, wants_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h and x, given that of `product_for_tokens`."""
    if not _head_by_head(x, x.dtype):
        dh = grad @ x.transpose(-2, -1) if wants_h else None
        return dh, h.transpose(-2, -1) @ grad if wants_x else None
    heads = list(zip(h.unbind(1), x.unbind(1), grad.unbind(1), strict=True))
    dh = torch.stack([torch.bmm(g, x_h.transpose(1, 2)) for _, x_h, g in heads], 1) if wants_h else None
    dx = torch.stack([torch.bmm(h_h.transpose(1, 2), g) for h_h, _, g in heads], 1) if wants_x else None
    return dh, dx


class _ProductForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(h, x)
        return tokens_forward(h, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return tokens_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


class _LowRankProduct(torch.autograd.Function):
    """Of few tokens; what w makes of x is worked out again backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(h, w, x)
        projected = _images_apart(torch.bmm(w.transpose(1, 2), _images_together(x)), x.shape[3])
        return (h @ projected).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, w, x = ctx.saved_tensors
        wants_h, wants_w, wants_x = ctx.needs_input_grad
        dh = dw = dx = None
        together = _images_together(x) if wants_h or wants_w else None
        if together is not None and wants_h:
            projected = _images_apart(torch.bmm(w.transpose(1, 2), together), x.shape[3])
            dh = grad @ projected.transpose(2, 3)
        if wants_w or wants_x:
            dprojected = _images_together(h.transpose(2, 3) @ grad)  # (H,R,B·D)
            if together is not None and wants_w:
                dw = torch.bmm(together, dprojected.transpose(1, 2))
            if wants_x:
                dx = _images_apart(torch.bmm(w, dprojected), x.shape[3])
        return dh, dw, dx
