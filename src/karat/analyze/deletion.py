"""Whether a map shows what the model looks at: patches are taken away, and the model is asked again.

It needs no mask of the object. Deletion by a map's ranking is Petsiuk et al.'s (RISE, BMVC 2018); comparing the most
with the least attended half, instead of a whole curve, is ours: two forward passes, and 0 for a map that says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.analyze.attention import BlockAttention, num_prefix_tokens, rollout, rollout_maps
from karat.models.evaluating import evaluating


def flow_maps(blocks: list[BlockAttention], grid: tuple[int, int]) -> Tensor:
    """How much reaches the class token from each patch through all blocks: (B,h,w), the rollout of |σ|.

    |σ| and not σ: a key with a large negative weight is looked at too. Raises ValueError for attention in windows.
    """
    num_prefix_tokens(blocks[-1].sigma, grid)
    return rollout_maps(rollout([block.sigma.abs() for block in blocks]), grid)


def without(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B,C,S,S) with the chosen patches, boolean (B,h,w), set to 0, the mean of normalised pixels."""
    size = images.shape[-2:]
    mask = nn.functional.interpolate(chosen.float().unsqueeze(1), size=size, mode="nearest") > 0.5
    return images.masked_fill(mask.to(images.device), 0.0)


def halves(maps: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The most and the least attended half of the patches of maps (B,h,w): boolean (B,h,w) each.

    Equal values, such as clipped ones, are ordered at random. With an odd number the middle one is in neither.
    """
    flat = maps.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    ordered = torch.argsort(flat.cpu().gather(1, shuffled), dim=1, descending=True, stable=True)
    places = shuffled.gather(1, ordered)
    half = flat.shape[1] // 2
    empty = torch.zeros(flat.shape, dtype=torch.bool)
    most, least = empty.scatter(1, places[:, :half], True), empty.scatter(1, places[:, flat.shape[1] - half :], True)
    return most.view(maps.shape), least.view(maps.shape)


@torch.no_grad()
def faithfulness(model: nn.Module, images: Tensor, maps: Tensor, *, seed: int = 0) -> Tensor:
    """p(ŷ | least attended half removed) - p(ŷ | most attended half removed) for images (B,C,S,S), maps (B,h,w): (B,).

    ŷ is the class that the model predicts for the whole image, p its softmax probability. 0: the map doesn't tell
    which patches matter; 1: all depends on those that it marks; negative: it marks those that don't. In evaluation
    mode.
    """
    with evaluating(model):
        predicted = model(images).argmax(1, keepdim=True)
        most, least = (
            model(without(images, chosen)).double().softmax(1).gather(1, predicted).squeeze(1)
            for chosen in halves(maps, seed=seed)
        )
    return least - most
