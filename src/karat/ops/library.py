"""Basis attention as an operator of torch.library: autograd, fake tensors, autocast, FLOP counts.

One opaque operator forward and one backward; inside, a table of implementations. It's what lets torch.compile,
the FLOP counter and autocast see basis attention as one thing, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from karat.basis import parse_basis
from karat.ops import implementations, reference


@torch.library.custom_op("karat::basis_attention", mutates_args=())
def basis_attention(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    impl: str,
) -> Tensor:
    """out (B,H,M,E); see `karat.basis_attention`."""
    parsed = parse_basis(basis)
    with reference.full_precision(q):
        return implementations.choose(impl, q, u, parsed).forward(q, k, u, parsed, scale, bias, mask)


@torch.library.custom_op("karat::basis_attention_backward", mutates_args=())
def basis_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, u, bias; an empty tensor where `needs` says that none is wanted."""
    parsed = parse_basis(basis)
    chosen = implementations.choose(impl, q, u, parsed)
    wanted = (needs[0], needs[1], needs[2], needs[3])
    with reference.full_precision(q):
        gradients = chosen.backward(grad, q, k, u, parsed, scale, bias, mask, wanted)
    dq, dk, du, dbias = (q.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dq, dk, du, dbias


@basis_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    impl: str,
) -> Tensor:
    return q.new_empty(*q.shape[:3], u.shape[-1])


@basis_attention_backward.register_fake
def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, du, dbias = empty_gradients(q, (q, k, u, bias), needs)
    return dq, dk, du, dbias


def empty_gradients(q: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Memory in the shapes of gradients: like the inputs, contiguous; without numbers where none is wanted."""
    return [
        q.new_empty(0) if x is None or not need else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(inputs, needs, strict=True)
    ]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, u, bias, mask, ctx.basis, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, u, bias, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, u, bias, mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    gradients = basis_attention_backward(grad, q, k, u, bias, mask, ctx.basis, ctx.scale, ctx.impl, needs)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *wanted, None, None, None, None


def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    """Raise RuntimeError: there is none."""
    raise RuntimeError(
        "basis attention has second derivatives in its reference implementation only; use impl='reference'"
    )


basis_attention.register_autograd(_backward, setup_context=_keep_inputs)
basis_attention_backward.register_autograd(refuse_second_derivative)


@register_flop_formula(torch.ops.karat.basis_attention)
def forward_flops(
    q: Sequence[int],
    k: Sequence[int],
    u: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Scores 2·B·H·M·N·D, contraction 2·B·H·M·N·F·E (a multiply-add is 2; shapes as in `karat.basis_attention`)."""
    B, H, M, D = q
    F, N, E = u[-3:]
    return 2 * B * H * M * N * (D + F * E)


@register_flop_formula(torch.ops.karat.basis_attention_backward)
def backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], u: Sequence[int], *args: object, **kwargs: object
) -> int:
    """Scores again, dQ and dK: 3·2MND; dU and the features' gradients: 2·2MNFE."""
    B, H, M, D = q
    F, N, E = u[-3:]
    return 2 * B * H * M * N * (3 * D + 2 * F * E)
