"""What a trained model's accuracy rests on: it is evaluated with parts of its learned attention taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from karat.analyze.landscape import evaluate
from karat.models.attach.mode import attached
from karat.models.attention import AttentionInputs
from karat.models.backbones import attention_sites
from karat.ops.masks import safe_softmax

# What is left of the learned part of attention, given it (B,H',M,N) and its mean over images (1,H',M,N).
KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda learned, mean: learned,
    "what all images have in common": lambda learned, mean: mean,
    "one row": lambda learned, mean: mean.mean(2, keepdim=True),
    "what follows the image": lambda learned, mean: learned - mean,
    "nothing": lambda learned, mean: torch.zeros_like(learned),
}


@dataclass(frozen=True)
class AblationOutcome:
    """Top-1 in %, and the mean cross-entropy."""

    top1: float
    loss: float


def ablate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, AblationOutcome]:
    """Evaluate a model with all of its learned attention, and with each of the parts in KEPT alone in all blocks.

    The learned part of a head is σ − softmax(A) beside softmax, gate included, else σ; softmax stays. The mean is over
    these images (B,C,height,width), in each block of the whole model; what lies before a block then changes with what
    was taken away there. Everything else, MLPs and projections, was trained with the whole and isn't trained again: a
    loss of accuracy says that the part is used, not that a model trained without it would lack as much.

    Raises ValueError for a model without learned attention of its own, or with attention in windows, whose means over
    images mix the windows, and for fewer than two images or images without a label each.
    """
    check_labelled(images, labels)
    sites = [site for site in attention_sites(model) if site.kind.learned]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no learned attention of its own, so there is nothing to take away; this needs "
            "one with learnable attention, such as g3b"
        )
    if any(attached(site.module) is not None for site in sites):
        raise ValueError(
            f"karat has no record of {type(model).__name__}, whose attention can't be computed with a part taken away; "
            "this needs a ViT, DeiT or ConViT"
        )
    if any(site.kind.windows for site in sites):
        raise ValueError(
            f"attention of {type(model).__name__} is cut into windows, which have no mean over images; this needs a "
            "ViT, DeiT or ConViT"
        )
    modules = [site.module for site in sites]
    sums: list[Tensor | float] = [0.0] * len(modules)

    def see(index: int, learned: Tensor) -> Tensor:
        sums[index] = sums[index] + learned.sum(0, keepdim=True)
        return learned

    with _learning(modules, see):
        evaluate(model, images, labels)
    means = [torch.as_tensor(total) / len(images) for total in sums]

    def outcome(kept: Callable[[Tensor, Tensor], Tensor]) -> AblationOutcome:
        with _learning(modules, lambda index, learned: kept(learned, means[index])):
            loss, top1 = evaluate(model, images, labels)
        return AblationOutcome(top1, loss)

    return {name: outcome(kept) for name, kept in KEPT.items()}


def check_labelled(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError for images that have no mean worth the name, or not a label each."""
    if len(images) < 2 or len(images) != len(labels):
        raise ValueError(
            f"{len(images)} images with {len(labels)} labels: a mean over images wants two or more, with a label each; "
            "give e.g. --samples 128"
        )


@contextmanager
def _learning(modules: list[Any], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While open, the index-th module's learned part of σ, (B,H',M,N) of the heads that learn, is what `change` makes
    of it."""

    def attend(index: int, inputs: AttentionInputs) -> Tensor:
        scores = inputs.scores.float()
        op = modules[index].present_operator(scores.shape[-1])
        sigma, heads = op(scores, inputs.mask).clone(), list(op.karat_heads)
        fixed = safe_softmax(scores, inputs.mask)[:, heads] if op.config.residual else 0.0
        sigma[:, heads] = fixed + change(index, sigma[:, heads] - fixed)
        return sigma.to(inputs.v.dtype) @ inputs.v

    try:
        for index, module in enumerate(modules):
            module._attend = partial(attend, index)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("_attend", None)
