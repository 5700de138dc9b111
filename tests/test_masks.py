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
