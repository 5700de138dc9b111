"""bfloat16 autocast trains as float32 does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from karat import create_model


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
