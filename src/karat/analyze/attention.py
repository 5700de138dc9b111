"""What a model attends to: scores and σ of every block and head, maps on the image grid, rollout, regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from karat.models.evaluating import evaluating
from karat.models.record import record
from karat.ops.masks import safe_softmax

T = TypeVar("T")


@dataclass(frozen=True)
class BlockAttention:
    """One block's attention: scores A and σ(A), both (B,H,M,N); in windowed models B counts windows.

    mask: boolean, broadcastable to (B,H,M,N), True = takes part, as in shifted windows; None where there is none.
    """

    name: str
    scores: Tensor
    sigma: Tensor
    mask: Tensor | None = None

    @property
    def softmax(self) -> Tensor:
        """What softmax makes of the same scores, (B,H,M,N), exactly zero for masked pairs."""
        return safe_softmax(self.scores, self.mask)


def attention_of(model: nn.Module, images: Tensor) -> list[BlockAttention]:
    """Scores and σ of every block of a model, softmax and KArAt alike, for images (B,C,height,width).

    The σ that is returned is the one that the model's own pass uses (to rounding). In evaluation mode.
    Raises ValueError for a model without attention that karat knows.
    """
    with evaluating(model), torch.no_grad(), record(model) as intermediates:
        model(images)
    return [
        BlockAttention(
            name,
            seen.scores.detach().float().cpu(),
            seen.attention.detach().float().cpu(),
            None if seen.mask is None else seen.mask.cpu(),
        )
        for name, seen in intermediates.items()
    ]


def choose_block(blocks: Sequence[T], block: int | None) -> T:
    """What there is of a block by its index, the last one for None. Raises ValueError for one that isn't there."""
    if block is None:
        return blocks[-1]
    if not 0 <= block < len(blocks):
        raise ValueError(f"block {block} isn't there: the model has blocks 0 to {len(blocks) - 1}")
    return blocks[block]


def check_head(head: int, num_heads: int) -> int:
    """The head, if it is there; ValueError otherwise."""
    if not 0 <= head < num_heads:
        raise ValueError(f"head {head} isn't there: the block has heads 0 to {num_heads - 1}")
    return head


class PooledGrid(tuple[int, int]):
    """(h, w) of a model whose head reads the patches: it has no class token, or one that it leaves aside."""


def grid_of(model: nn.Module) -> tuple[int, int]:
    """(h, w): the patches of an image, a `PooledGrid` where the head reads them. ValueError for a model without any."""
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no grid of patches; maps need a ViT, DeiT or ConViT")
    grid = int(size[0]), int(size[1])
    pooled = getattr(model, "cls_token", "elsewhere") is None or getattr(model, "global_pool", "") not in ("token", "")
    return PooledGrid(grid) if pooled else grid


def num_prefix_tokens(sigma: Tensor, grid: tuple[int, int]) -> int:
    """How many of σ's keys are no patches (class token, registers). Raises ValueError where σ has windows."""
    extra = sigma.shape[-1] - grid[0] * grid[1]
    if extra < 0 or sigma.shape[-2] != sigma.shape[-1]:
        raise ValueError(
            f"attention of {sigma.shape[-1]} tokens doesn't span the image's {grid[0]}×{grid[1]} patches (it is cut "
            "into windows, as in Swin, or pooled): maps need a ViT, DeiT or ConViT; spectra, functions and measures "
            "do not"
        )
    return extra


def class_maps(sigma: Tensor, grid: tuple[int, int], *, signed: bool = False) -> Tensor:
    """How strongly the class token looks at each patch: σ (B,H,N,N) -> (B,H,h,w).

    Row 0 of σ over the patch keys; where the head reads the patches (no class token, a `PooledGrid`) the mean over
    theirs. Negative values, which KArAt has, are clipped to zero as in the paper's figures, or kept with `signed`.
    """
    prefix = num_prefix_tokens(sigma, grid)
    pooled = not prefix or isinstance(grid, PooledGrid)
    row = sigma[..., prefix:, :].mean(-2) if pooled else sigma[..., 0, :]
    maps = row[..., prefix:].unflatten(-1, grid)
    return maps if signed else maps.clamp_min(0)


def rollout(blocks: list[Tensor], *, residual: float = 0.5) -> Tensor:
    """How attention flows through all blocks (Abnar & Zuidema 2020): L times σ (B,H,N,N) -> (B,N,N), rows sum to 1.

    Â = (1 - r)·Ā + r·I with Ā the mean over heads of σ, negative values clipped, rows summing to 1; the answer is
    the product Â_L ⋯ Â_1. A row whose values are all clipped attends to itself. Blocks at the start with another
    number of tokens (ConViT) are left out.
    """
    if not blocks:
        raise ValueError("rollout needs the attention of one block at least, got none")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must lie in [0, 1], got {residual}")
    M, N = blocks[-1].shape[-2:]
    if M != N:
        raise ValueError(f"rollout needs as many queries as keys in the last block, got {M} and {N}")
    eye = torch.eye(N, dtype=blocks[-1].dtype)
    total = eye.expand(blocks[-1].shape[0], N, N)
    for sigma in reversed(blocks):
        if sigma.shape[-2:] != (N, N):
            break
        mean = sigma.mean(1).clamp_min(0)
        sums = mean.sum(-1, keepdim=True)
        mean = torch.where(sums > 0, mean / sums, eye)
        total = total @ ((1 - residual) * mean + residual * eye)
    return total


def rollout_maps(flow: Tensor, grid: tuple[int, int]) -> Tensor:
    """What reaches the class token, or the patches where the head reads them, from each patch: (B,N,N) -> (B,h,w)."""
    return class_maps(flow.unsqueeze(1), grid).squeeze(1)


def dominant_heads(maps: Tensor) -> Tensor:
    """The head of each image whose map (B,H,h,w) has the largest energy Σ m²: (B,).

    Under softmax, whose rows sum to one, that is the most concentrated head; under KArAt the one that weighs most.
    """
    return maps.square().sum((-2, -1)).argmax(-1)


def region(maps: Tensor, share: float = 0.5) -> Tensor:
    """The fewest patches that hold `share` of each map's mass: (...,h,w) -> boolean (...,h,w).

    Negative values count as zero; a map without mass has an empty region.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    flat = maps.clamp_min(0).flatten(-2)
    ordered, places = flat.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the patches that come earlier
    chosen = (before < share * flat.sum(-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(chosen).scatter(-1, places, chosen).unflatten(-1, maps.shape[-2:])


def dominant_regions(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The dominant head of each image and the region that it picks: maps (B,H,h,w) -> (B,), boolean (B,h,w)."""
    heads = dominant_heads(maps)
    chosen = maps[torch.arange(len(maps)), heads]
    return heads, region(chosen)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (...,h,w) at an image's size, bilinear: (...,height,width)."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    grown = nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return grown.reshape(*maps.shape[:-2], *size)
