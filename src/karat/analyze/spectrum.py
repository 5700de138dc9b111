"""Singular values of attention before and after activation, and how many of them matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Singular values over heads and images, descending: mean, least and greatest, (K,) each; two ranks as numbers."""

    mean: Tensor
    low: Tensor
    high: Tensor
    effective_rank: float
    scree_index: int


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values (...,K) of matrices (...,M,N), descending, K = min(M,N). Raises ValueError for NaN or Inf."""
    if not torch.isfinite(matrices).all():
        raise ValueError("singular values need finite numbers; the attention holds NaN or Inf")
    return torch.linalg.svdvals(matrices)


def effective_rank(values: Tensor) -> Tensor:
    """exp(-Σ p ln p), p = s/Σs (Roy & Vetterli 2007): singular values (...,K) -> (...).

    r equal values, the others zero, give r; a zero matrix gives 0.
    """
    total = values.sum(-1, keepdim=True)
    p = torch.where(total > 0, values / total, 0)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, 0)


def scree_index(values: Tensor) -> int:
    """Where the scree plot breaks: how many of the singular values (K,) stand before the elbow.

    The cut of the log values into two groups, with two means and one variance, that is likeliest (the profile
    likelihood of Zhu & Ghodsi 2006). Values below K · machine epsilon of the largest count as that much. 0 for a
    zero matrix.
    """
    K = len(values)
    if values.max() <= 0:
        return 0
    if K < 3:
        return K
    floor = K * torch.finfo(values.dtype).eps * values.max()
    logs = values.clamp_min(floor).double().log()
    best, least = K, float("inf")
    for q in range(1, K):
        first, rest = logs[:q], logs[q:]
        spread = float((first - first.mean()).square().sum() + (rest - rest.mean()).square().sum())
        if spread < least:
            best, least = q, spread
    return best


def spectrum(matrices: Tensor) -> Spectrum:
    """The spectrum of attention (B,H,M,N): mean, least and greatest over heads and images (paper, §5.2).

    The effective rank is the mean over heads and images, the scree index that of the mean spectrum.
    """
    values = singular_values(matrices).flatten(0, -2)  # (B·H,K)
    mean = values.mean(0)
    return Spectrum(
        mean=mean,
        low=values.amin(0),
        high=values.amax(0),
        effective_rank=float(effective_rank(values).mean()),
        scree_index=scree_index(mean),
    )
