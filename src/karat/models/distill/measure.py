"""How much of the teacher's attention a student's operators explain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karat.models.distill.sites import Arguments, sites, watching
from karat.models.evaluating import evaluating


@dataclass(frozen=True)
class BlockReport:
    """One attention of the student beside the teacher's, as shares of variance, 1 at best.

    explained: of σ_softmax V by the operator's, head by head on the student's own queries, keys and values, averaged
    over the heads. fixed: the same by σ's mean row, which knows nothing of the scores. followed: of the teacher's
    attention output, projection included and on the teacher's own tokens, by the student's on its own tokens.
    Variance is about the mean over images, tokens and channels of a head (explained, fixed) or of each channel.
    """

    name: str
    explained: float
    fixed: float
    followed: float


@dataclass
class _Variance:
    """Sums for a share of variance, one for each of some places."""

    error: Any = 0.0
    total: Any = 0.0
    square: Any = 0.0
    count: int = 0

    def add(self, target: Tensor, guess: Tensor) -> None:
        """target, guess (places, numbers)."""
        target, guess = target.double(), guess.double()
        self.error = self.error + (target - guess).square().sum(-1)
        self.total = self.total + target.sum(-1)
        self.square = self.square + target.square().sum(-1)
        self.count += target.shape[-1]

    def share(self) -> float:
        """1 - error / variance, the places' variances pooled."""
        variance = self.square - self.total**2 / self.count
        return float(1 - self.error.sum() / variance.sum())


@torch.no_grad()
def measure_blocks(student: nn.Module, teacher: nn.Module, images: Iterable[Tensor]) -> list[BlockReport]:
    """Compare every learnable attention of `student` with the teacher's over batches of images (B,C,height,width).

    Raises ValueError where there are no images, or the models don't fit each other.
    """
    places = sites(student, teacher)
    sums = {site.name: [_Variance() for _ in range(3)] for site in places}
    batches = list(images)
    if not batches:
        raise ValueError("there are no images to measure on: give at least one")
    rows = _mean_rows(student, teacher, batches)
    for batch in batches:
        for site, call, mine, theirs in _both(student, teacher, batch):
            own, reference = site.read(call)
            heads = list(site.operator.karat_heads)
            target = (reference.softmax @ reference.v)[:, heads]
            guess = site.operator.attend(*own[:3], scale=own.scale, bias=own.bias, mask=own.mask)[:, heads]
            fixed = (rows[site.name] @ reference.v)[:, heads].expand_as(target)
            explained, unmoved, followed = sums[site.name]
            explained.add(target.transpose(0, 1).flatten(1), guess.transpose(0, 1).flatten(1))
            unmoved.add(target.transpose(0, 1).flatten(1), fixed.transpose(0, 1).flatten(1))
            followed.add(theirs.flatten(0, -2).T, mine.flatten(0, -2).T)
    return [BlockReport(site.name, *(part.share() for part in sums[site.name])) for site in places]


def _both(student: nn.Module, teacher: nn.Module, batch: Tensor) -> list[tuple[Any, Arguments, Tensor, Tensor]]:
    places = sites(student, teacher)
    modules = [site.student for site in places] + [site.teacher for site in places]
    with evaluating(student), evaluating(teacher), watching(modules) as seen:
        student(batch)
        teacher(batch)
    return [(site, *seen[site.student], seen[site.teacher][1]) for site in places]


def _mean_rows(student: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The mean of the teacher's attention over images and queries, (1,H,1,N), of each block."""
    totals: dict[str, Tensor] = {}
    for batch in batches:
        for site, call, _, _ in _both(student, teacher, batch):
            row = site.read(call)[1].softmax.mean((0, 2), keepdim=True) / len(batches)
            totals[site.name] = totals.get(site.name, torch.zeros_like(row)) + row
    return totals
