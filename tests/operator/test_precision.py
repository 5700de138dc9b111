"""bfloat16 autocast trains as float32 does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from karat import create_model
from karat.operator.operator import KArAtOperator

N = 6
OPERATORS = (
    "g2b,rank=3",
    "g2b,rank=3,order=PhiW",
    "g2b,rank=3,order=PhiPhi",
    "g2b,rank=None",
    "g2b,rank=None,order=Pointwise",
    "g2b,rank=3,order=Pointwise,position=query",
    "g2b,rank=3,residual=softmax,gate=0.5",
    "static-b,residual=softmax,gate=0.5",
)
MASKS = {
    "none": None,
    "keys": torch.arange(N).view(1, 1, 1, N) != 2,
    "pairs": torch.ones(N, N, dtype=torch.bool).tril().view(1, 1, N, N),
}


@pytest.mark.parametrize("config", OPERATORS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("dropout_p", [0.0, 1e-9], ids=["fast", "with dropout"])
def test_a_bias_may_be_kept_in_higher_precision(config: str, mask: Tensor | None, dropout_p: float) -> None:
    torch.manual_seed(0)
    op = KArAtOperator(2, N, config)
    q, k, v = (torch.randn(3, 2, N, 4, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 2, N, N)
    out = op.attend(q, k, v, bias=bias, mask=mask, dropout_p=dropout_p)
    assert out.dtype == torch.bfloat16
    wide = op(q.float() @ k.float().transpose(-2, -1) * 4**-0.5 + bias, mask) @ v.float()
    torch.testing.assert_close(out.float(), wide, rtol=0.05, atol=0.05)


def final_loss(seed: int, autocast: bool) -> float:
    """Mean loss of the last 40 of 200 steps on scikit-learn's digits."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = create_model("vit_tiny_patch16_224", attention="g3b", num_classes=10, **size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(200):
        batch = torch.randint(0, len(labels), (32,))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-40:]) / 40


@pytest.mark.slow
def test_two_hundred_steps_in_bfloat16_end_where_float32_ends() -> None:
    seeds = range(3)
    low = torch.tensor([final_loss(seed, autocast=True) for seed in seeds])
    full = torch.tensor([final_loss(seed, autocast=False) for seed in seeds])
    assert (full < 1.0).all()  # it has learned: log 10 = 2.3 at the start
    noise = full.std() + 0.05 * full.mean()
    assert (low.mean() - full.mean()).abs() <= 2 * noise
