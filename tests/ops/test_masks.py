"""Softmax under masks of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karat.ops.masks import safe_softmax, softmax_attention


@pytest.mark.parametrize("scale", [-0.3, 1e-4, 0.125])
def test_masked_keys_of_many_tokens_weigh_nothing_at_any_scale(scale: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 1100, 8).unbind()
    mask = torch.rand(1, 1, 1, 1100) > 0.5
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(softmax_attention(q, k, v, scale, None, mask), scores.softmax(-1) @ v)


@pytest.mark.parametrize("filler", [1e5, 1e30, float("nan")])
def test_masked_keys_of_many_tokens_may_be_anything(filler: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 1100, 8).unbind()
    k[:, :, 1000:] = filler
    out = softmax_attention(q, k, v, 0.3, None, (torch.arange(1100) < 1000)[None, None, None])
    torch.testing.assert_close(out, softmax_attention(q, k[:, :, :1000], v[:, :, :1000], 0.3))


@pytest.mark.parametrize("filler", [float("-inf"), float("nan")])
def test_rows_without_a_key_have_no_gradient_whatever_their_scores(filler: float) -> None:
    """As where whoever gives the mask has put minus infinity there already."""
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    scores = torch.randn(1, 1, 5, 5).masked_fill(~mask, filler).requires_grad_()
    q, k, v = (torch.randn(1, 1, 5, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    for out in (safe_softmax(scores, mask), softmax_attention(q, k, v, 0.3, scores.detach(), mask)):
        out.float().square().sum().backward()
        assert not out[:, :, 2].any()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (scores, q, k, v))


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float16, 17), (torch.bfloat16, 65)])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_computed_in_float32_on_a_cpu(dtype: torch.dtype, tokens: int, masked: bool) -> None:
    q, k, v, bias, mask = half_precision(dtype, tokens, masked)
    out = softmax_attention(q, k, v, 0.3, bias, mask)
    full = softmax_attention(q.float(), k.float(), v.float(), 0.3, bias.float(), mask)
    assert out.dtype == dtype
    assert torch.equal(out, full.to(dtype))


@pytest.mark.parametrize("kind", ["bias", "mask of pairs", "both", "mask of keys", "neither"])
def test_few_keys_in_bfloat16_are_plain_products_on_a_cpu(kind: str) -> None:
    q, k, v, bias, mask = half_precision(torch.bfloat16, 17, kind != "neither" and kind != "bias")
    if kind == "mask of keys":
        assert mask is not None
        mask = mask[:, :, :1]
    if kind not in ("bias", "both"):
        bias = None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = softmax_attention(q, k, v, 0.3, bias, mask)
    assert {x.dtype for x in kept if x.is_floating_point()} == {torch.bfloat16}
    assert any(x.shape[-2:] == (17, 17) for x in kept if x.is_floating_point())  # P
    exact = [x.detach().double().requires_grad_() for x in inputs]
    full = softmax_attention(*exact, 0.3, None if bias is None else bias.double(), mask)  # type: ignore[arg-type]
    grad = torch.randn(out.shape, dtype=torch.float64)
    assert out.dtype == torch.bfloat16
    for ours, theirs in zip(
        (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))),
        (full, *torch.autograd.grad(full, exact, grad)),
        strict=True,
    ):
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_queries_in_half_precision_take_keys_and_values_in_float32(half: torch.dtype) -> None:
    q, k, v, _, mask = half_precision(half, 17, True)
    out = softmax_attention(q, k.float(), v.float(), 0.3, None, mask)
    assert torch.equal(out, softmax_attention(q.float(), k.float(), v.float(), 0.3, None, mask).to(half))


def test_few_keys_in_bfloat16_are_dropped_as_in_float32() -> None:
    q, k = torch.zeros(2, 1, 1, 4000, 1, dtype=torch.bfloat16).unbind()
    q, k = q.expand(-1, -1, -1, 64), k[:, :, :16].expand(-1, -1, -1, 64)
    v = torch.ones(1, 1, 16, 64, dtype=torch.bfloat16)
    out = softmax_attention(q, k, v, 1.0, None, None, 0.25)[..., 0].double()
    assert abs(out.mean() - 1) < 0.02
    assert abs(out.var() - 0.25 / 0.75 / 16) < 0.005


def half_precision(
    dtype: torch.dtype, tokens: int, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, a bias and, if wanted, a mask of pairs."""
    q, k, v = torch.randn(3, 2, 3, tokens, 8).to(dtype).unbind()
    bias = torch.randn(1, 3, tokens, tokens).to(dtype)
    return q, k, v, bias, torch.rand(2, 1, tokens, tokens) > 0.3 if masked else None
