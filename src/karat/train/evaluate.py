"""Accuracy and loss over an evaluation set, each image counted once however many processes share the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from karat.models.evaluating import evaluating


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 in percent, and the number of images.

    Args:
        model: gives logits (B, classes); left in the mode it came in.
        batches: this process's share of images (B,C,height,width) and labels (B,); rows with a negative label are
            padding and count for nothing.
    """
    device = accelerator.device
    precision = torch.float32 if device.type == "mps" else torch.float64  # whole numbers stay exact to 2^24, 2^53
    sums = torch.zeros(4, dtype=precision, device=device)  # images, loss, top-1, top-5
    with evaluating(model):
        for images, labels in batches:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with accelerator.autocast():
                logits = model(images)
            real = labels >= 0
            logits, labels = logits[real].float(), labels[real]
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            ones = loss.new_tensor(len(labels))
            sums += torch.stack([ones, loss, hits[:, 0].sum(), hits.any(1).sum()]).to(precision)
    total: Any = accelerator.reduce(sums, "sum")
    images_seen, loss_sum, top1, top5 = total.tolist()
    if images_seen == 0:
        raise ValueError("the evaluation set is empty: nothing to measure")
    return {
        "eval_loss": loss_sum / images_seen,
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "images": int(images_seen),
    }
