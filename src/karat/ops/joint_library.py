"""Joint attention as an operator of torch.library, as `library` has basis attention; the same implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from karat.basis import parse_basis
from karat.ops import implementations, reference
from karat.ops.library import empty_gradients, refuse_second_derivative
from karat.ops.softmax_part import SoftmaxPart


def _memory(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For attended (B,H,M,Dv), laid out as (B,M,H,Dv), and logsumexp (B,H,M)."""
    B, H, M, _ = q.shape
    attended = q.new_empty(B, M, H, v.shape[-1]).transpose(1, 2)
    return attended, q.new_empty(B, H, M, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("karat::joint_attention", mutates_args=())
def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    score_gradient: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """attended (B,H,M,Dv), sums (B,H,M,E), logsumexp (B,H,M); see `karat.ops.joint_attention`."""
    parsed = parse_basis(basis)
    part = SoftmaxPart(v, *_memory(q, v))
    with reference.full_precision(q):
        chosen = implementations.choose(impl, q, u, parsed, v)
        sums = chosen.forward(q, k, u, parsed, scale, bias, mask, part)
    return part.attended, sums, part.logsumexp


@torch.library.custom_op("karat::joint_attention_backward", mutates_args=())
def joint_attention_backward(
    grad_attended: Tensor,
    grad_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    attended: Tensor,
    logsumexp: Tensor,
    basis: str,
    scale: float,
    score_gradient: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, u, bias; an empty tensor where `needs` says that none is wanted."""
    parsed = parse_basis(basis)
    chosen = implementations.choose(impl, q, u, parsed, v)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if needs[2] else None
    part = SoftmaxPart(v, attended, logsumexp, grad_attended, dv, score_gradient)
    wanted = (needs[0], needs[1], needs[3], needs[4])
    with reference.full_precision(q):
        gradients = chosen.backward(grad_sums, q, k, u, parsed, scale, bias, mask, wanted, part)
    dq, dk, du, dbias = (q.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dq, dk, q.new_empty(0) if dv is None else dv, du, dbias


@joint_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    scale: float,
    score_gradient: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    attended, logsumexp = _memory(q, v)
    return attended, q.new_empty(*q.shape[:3], u.shape[-1]), logsumexp


@joint_attention_backward.register_fake
def _fake_backward(
    grad_attended: Tensor,
    grad_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    attended: Tensor,
    logsumexp: Tensor,
    basis: str,
    scale: float,
    score_gradient: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, du, dbias = empty_gradients(q, (q, k, v, u, bias), needs)
    return dq, dk, dv, du, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.basis, ctx.scale, ctx.score_gradient, ctx.impl = inputs
    attended, _, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(*tensors, attended, logsumexp)


def _backward(ctx: Any, grad_attended: Tensor, grad_sums: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    settings = (ctx.basis, ctx.scale, ctx.score_gradient, ctx.impl)
    gradients = joint_attention_backward(grad_attended, grad_sums, *ctx.saved_tensors, *settings, needs)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *wanted, None, None, None, None, None


joint_attention.register_autograd(_backward, setup_context=_keep)
joint_attention_backward.register_autograd(refuse_second_derivative)


@register_flop_formula(torch.ops.karat.joint_attention)
def forward_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    u: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Scores 2·B·H·M·N·D, softmax's product with v 2·B·H·M·N·Dv, contraction 2·B·H·M·N·F·E."""
    B, H, M, D = q
    F, N, E = u[-3:]
    return 2 * B * H * M * N * (D + v[-1] + F * E)


@register_flop_formula(torch.ops.karat.joint_attention_backward)
def backward_flops(
    grad_attended: Sequence[int],
    grad_sums: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    u: Sequence[int],
    *args: object,
    **kwargs: object,
) -> int:
    """Scores again, dQ and dK: 3·2MND; dV and the probabilities' gradient: 2·2MNDv; dU and the features': 2·2MNFE."""
    B, H, M, D = q
    F, N, E = u[-3:]
    return 2 * B * H * M * N * (3 * D + 2 * v[-1] + 2 * F * E)
