"""How good a map is, as numbers: entropy, sparsity, rank, diversity of heads, overlap with an object.

σ may be negative under KArAt, so measures of concentration take |σ| row by row; where all rows are positive and sum
to one they are the usual ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from karat.analyze.spectrum import effective_rank, singular_values


def entropy(sigma: Tensor) -> Tensor:
    """-Σ_n p_n ln p_n / ln N with p = |σ|/Σ|σ|, a row: (...,N) -> (...); 0 one key, 1 uniform. Rows of zeros give 1."""
    size = sigma.abs()
    total = size.sum(-1, keepdim=True)
    p = torch.where(total > 0, size / total, 1 / sigma.shape[-1])
    return torch.special.entr(p).sum(-1) / math.log(max(sigma.shape[-1], 2))


def sparsity(sigma: Tensor) -> Tensor:
    """(√N - ‖σ‖₁/‖σ‖₂)/(√N - 1) of a row (Hoyer 2004): (...,N) -> (...); 1 one key, 0 uniform. Zeros give 0,
    and a single key 1."""
    root = math.sqrt(sigma.shape[-1])
    if root == 1:
        return torch.ones_like(sigma[..., 0])
    norm = sigma.norm(dim=-1)
    ratio = torch.where(norm > 0, sigma.abs().sum(-1) / norm, root)
    return (root - ratio) / (root - 1)


def head_diversity(sigma: Tensor) -> Tensor:
    """1 - cos(σ_g, σ_h), mean over pairs of heads: (B,H,M,N) -> (B,); 0 all alike, 1 orthogonal. One head gives 0."""
    B, H = sigma.shape[:2]
    if H == 1:
        return sigma.new_zeros(B)
    unit = torch.nn.functional.normalize(sigma.flatten(2), dim=-1)
    cosines = unit @ unit.transpose(-2, -1)
    pairs = torch.triu_indices(H, H, 1)
    return (1 - cosines[:, pairs[0], pairs[1]]).mean(-1)


def negative_mass(sigma: Tensor) -> Tensor:
    """Σ|min(σ, 0)| / Σ|σ| of a row: (...,N) -> (...); what clipping hides from a map. Rows of zeros give 0."""
    total = sigma.abs().sum(-1)
    return torch.where(total > 0, sigma.clamp_max(0).abs().sum(-1) / total, 0)


def pointing_game(maps: Tensor, mask: Tensor) -> Tensor:
    """Whether each map's largest value lies on the object (Zhang et al. 2018): (...,h,w), boolean (...,h,w) -> (...).

    Maps without any positive value point nowhere: False.
    """
    _check_mask(maps, mask)
    flat = maps.flatten(-2)
    top = flat.argmax(-1, keepdim=True)
    hit = mask.expand(maps.shape).flatten(-2).gather(-1, top).squeeze(-1)
    return hit & (flat.amax(-1) > 0)


def iou(chosen: Tensor, mask: Tensor) -> Tensor:
    """|R ∩ O| / |R ∪ O| of a region and an object, boolean (...,h,w) each -> (...). Two empty ones give 0."""
    _check_mask(chosen, mask)
    union = (chosen | mask).sum((-2, -1))
    return (chosen & mask).sum((-2, -1)) / union.clamp_min(1)


def mass_inside(maps: Tensor, mask: Tensor) -> Tensor:
    """The share of each map's positive mass that lies on the object: (...,h,w), boolean (...,h,w) -> (...)."""
    _check_mask(maps, mask)
    positive = maps.clamp_min(0)
    total = positive.sum((-2, -1))
    return torch.where(total > 0, (positive * mask).sum((-2, -1)) / total, 0)


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """The pixels whose centres lie in a box (x0, y0, x1, y1): boolean (height, width)."""
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box {box} is empty: give (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
    ys, xs = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    return ((ys >= y0) & (ys < y1))[:, None] & ((xs >= x0) & (xs < x1))


def measures(sigma: Tensor) -> dict[str, Tensor]:
    """Every measure that needs σ (B,H,M,N) alone, per head and averaged over images and queries: name -> (H,).

    `head_diversity` belongs to the block, so its H numbers are one.
    """
    H = sigma.shape[1]
    return {
        "entropy": entropy(sigma).mean((0, 2)),
        "sparsity": sparsity(sigma).mean((0, 2)),
        "effective_rank": effective_rank(singular_values(sigma)).mean(0),
        "negative_mass": negative_mass(sigma).mean((0, 2)),
        "head_diversity": head_diversity(sigma).mean().expand(H),
    }


def _check_mask(maps: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f"the object's mask must be boolean and of the map's size {tuple(maps.shape[-2:])}; got {mask.dtype}, "
            f"{tuple(mask.shape)}: bring the maps to the image's size with upsample(maps, size)"
        )
