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
    means = _means(model, modules, images, labels)
    return {name: _evaluate(model, modules, means, kept, images, labels) for name, kept in KEPT.items()}


def check_labelled(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError for images that have no mean worth the name, or not a label each."""
    if len(images) < 2 or len(images) != len(labels):
        raise ValueError(
            f"{len(images)} images with {len(labels)} labels: a mean over images wants two or more, with a label each; "
            "give e.g. --samples 128"
        )


def _learned(module: Any, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """σ without the learned part (B,H,M,N), and that part, of the heads that learn (B,H',M,N)."""
    scores = inputs.scores.float()
    op = module.present_operator(scores.shape[-1])
    sigma = op(scores, inputs.mask)
    heads = list(op.karat_heads)
    fixed = safe_softmax(scores, inputs.mask) if op.config.residual or op.softmax_heads else torch.zeros_like(sigma)
    if not op.config.residual:
        fixed[:, heads] = 0
    return fixed, sigma[:, heads] - fixed[:, heads]


@contextmanager
def _attending(modules: list[Any], ways: list[Callable[[AttentionInputs], Tensor]]) -> Iterator[None]:
    """The modules attend in these ways, (B,H,M,N) for the inputs of each, while the context is open."""

    def attend(way: Callable[[AttentionInputs], Tensor], inputs: AttentionInputs) -> Tensor:
        sigma = way(inputs).to(inputs.v.dtype)
        return sigma @ inputs.v

    try:
        for module, way in zip(modules, ways, strict=True):
            module._attend = partial(attend, way)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("_attend", None)


def _means(model: nn.Module, modules: list[Any], images: Tensor, labels: Tensor) -> list[Tensor]:
    """The mean over images of each module's learned part, (1,H',M,N)."""
    sums: list[Tensor | float] = [0.0] * len(modules)

    def see(index: int, inputs: AttentionInputs) -> Tensor:
        fixed, learned = _learned(modules[index], inputs)
        sums[index] = sums[index] + learned.sum(0, keepdim=True)
        return _joined(modules[index], fixed, learned)

    with _attending(modules, [partial(see, index) for index in range(len(modules))]):
        evaluate(model, images, labels)
    return [torch.as_tensor(total) / len(images) for total in sums]


def _joined(module: Any, fixed: Tensor, learned: Tensor) -> Tensor:
    sigma = fixed.clone()
    heads = list(module.operator.karat_heads)
    sigma[:, heads] += learned
    return sigma


def _evaluate(
    model: nn.Module,
    modules: list[Any],
    means: list[Tensor],
    kept: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> AblationOutcome:
    def attend(module: Any, mean: Tensor, inputs: AttentionInputs) -> Tensor:
        fixed, learned = _learned(module, inputs)
        return _joined(module, fixed, kept(learned, mean))

    with _attending(modules, [partial(attend, *pair) for pair in zip(modules, means, strict=True)]):
        loss, top1 = evaluate(model, images, labels)
    return AblationOutcome(top1, loss)
