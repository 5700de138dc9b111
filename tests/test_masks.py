"""Softmax under masks of keys."""

from __future__ import annotations

import pytest
import torch

from karat.masks import softmax_attention


@pytest.mark.parametrize("scale", [-0.3, 1e-4, 0.125])
def test_masked_keys_of_many_tokens_weigh_nothing_at_any_scale(scale: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 1100, 8).unbind()
    mask = torch.rand(1, 1, 1, 1100) > 0.5
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(softmax_attention(q, k, v, scale, None, mask), scores.softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_computed_in_float32_on_a_cpu(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 17, 8).to(dtype).unbind()
    bias, mask = torch.randn(1, 3, 17, 17), torch.rand(2, 1, 17, 17) > 0.3 if masked else None
    out = softmax_attention(q, k, v, 0.3, bias, mask)
    full = softmax_attention(q.float(), k.float(), v.float(), 0.3, bias.to(dtype).float(), mask)
    assert out.dtype == dtype
    assert torch.equal(out, full.to(dtype))
