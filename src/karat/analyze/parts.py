"""What the learned part of attention looks at: a row that is always the same, the query's place, or the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat.analyze.attention import BlockAttention
from karat.models.record import recorded
from karat.operator.operator import KArAtOperator

FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Shares:
    """The power of some heads' attention, E Σ_n σ_kn² over images and queries k, and what it consists of; (H,) each.

    row + place + scores = 1: the share of the mean row, the same for every query of every image; of what each
    query's place adds to it in all images alike; and of the rest, which follows the image through the scores.
    """

    power: Tensor
    row: Tensor
    place: Tensor
    scores: Tensor


@dataclass(frozen=True)
class AttentionParts:
    """One block: the heads that learn, their gates (1 without any), the learned part and softmax of the same scores."""

    name: str
    heads: tuple[int, ...]
    gates: Tensor  # (H',)
    learned: Shares
    softmax: Shares

    @property
    def size(self) -> Tensor:
        """√(power of the learned part, gate included, over softmax's), (H',)."""
        return (self.learned.power / self.softmax.power).sqrt()


def shares(sigma: Tensor) -> Shares:
    """How the power of σ (B,H,M,N) over B images divides.

    With m_n the mean of σ_kn over images and queries and c_kn that over images alone: row = Σ_n m_n²,
    place = mean_k Σ_n (c_kn − m_n)², scores = mean Σ_n (σ_kn − c_kn)², where the last is corrected for what B images
    hide, B/(B−1), at the cost of `place`: with few images that may come out below 0.

    Raises ValueError for fewer than two images.

    >>> always = torch.rand(1, 1, 1, 5).expand(4, 1, 5, 5)
    >>> found = shares(always)
    >>> round(float(found.row), 6), round(float(found.scores), 6)
    (1.0, 0.0)
    """
    B = sigma.shape[0]
    if B < FEWEST_IMAGES:
        raise ValueError(f"what attention owes to the image shows on two images or more, not on {B}: give --images 64")
    sigma = sigma.double()
    each = sigma.mean(0)  # (H,M,N)
    power = sigma.square().sum(-1).mean((0, 2))
    row = each.mean(1).square().sum(-1)
    scores = (sigma - each).square().sum(-1).mean((0, 2)) * B / (B - 1)
    safe = power.clamp(min=torch.finfo(power.dtype).tiny)
    return Shares(power, row / safe, 1 - (row + scores) / safe, scores / safe)


def parts_of(model: nn.Module, blocks: list[BlockAttention]) -> list[AttentionParts]:
    """The parts of every block that learns; blocks as `attention_of(model, images)` gives them.

    Beside softmax (residual="softmax") the learned part is σ − softmax(A), gate included; else it is σ.

    Raises ValueError for attention in windows, whose first axis counts windows and not images, and too few images.
    """
    found = []
    for block, (site, op) in zip(blocks, recorded(model), strict=True):
        if op is None:
            continue
        if site.kind.windows:
            raise ValueError(
                f"attention of {type(model).__name__} is cut into windows: a query's place and row belong to its "
                "window, not to the image, so it has no such parts; they need a ViT, DeiT or ConViT"
            )
        heads = list(op.karat_heads)
        softmax = block.softmax[:, heads]
        sigma = block.sigma[:, heads]
        learned = sigma - softmax if op.config.residual else sigma
        found.append(AttentionParts(block.name, op.karat_heads, _gates(op), shares(learned), shares(softmax)))
    return found


def _gates(op: KArAtOperator) -> Tensor:
    if op.gate is not None:
        gates: Tensor = op.gate.detach().float().cpu().expand(len(op.karat_heads))
        return gates
    return torch.full((len(op.karat_heads),), float(op.config.gate) if op.config.residual else 1.0)
