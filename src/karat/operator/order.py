"""What an order is: how Φ and W make σ out of the scores, how it starts and how fast it learns (SPEC §1, §8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.operator.layout import Layout
from karat.operator.parameters import OperatorParameters, Settings
from karat.operator.power import scale_edges
from karat.operator.rates import Gains
from karat.ops import Call, basis_contraction
from karat.ops.products import low_rank_product

# Numbers that op(scores) may hold at a time in a feature or edge tensor when no graph is recorded.
CHUNK_NUMBERS = 1 << 25
NO_HIDDEN = "simplex='rank' acts on the R numbers before W, which order='WPhi' has with a rank: use 'row'"


class Order(ABC):
    """How Φ and W make σ out of the scores.

    A query is served in two steps. `to_sum` says what is summed over the keys, by `karat.ops.basis_sums` or beside
    softmax by `joint_sums`; an order that sums nothing gives None and has `form`. `finish` makes σ v of the sums. Both
    are given v, and may fold it into what is summed; where they aren't, they make σ itself.
    """

    name: ClassVar[str]  # in the setting `order`, or in the place of a basis where there are no edges
    has_rank: ClassVar[bool] = True
    title: ClassVar[str] = "this order"
    layout: ClassVar[Layout]
    gives_sigma: ClassVar[bool] = False  # whether the sums, v aside, are σ itself
    own_key: ClassVar[bool] = False  # whether each query has a key of its own, as in self-attention alone
    argument: ClassVar[str] = "score"  # what the first edge functions act on, as an axis is called

    def refuses(self, config: Settings) -> str | None:
        """Why these settings don't go with the order; None if they do."""
        if config.simplex == "rank":
            return NO_HIDDEN
        if config.position:
            return f"position={config.position} acts on the R sums before W: it needs order='WPhi' and a rank, not None"
        return None

    def layout_for(self, config: Settings) -> Layout:
        """The layout, without what these settings leave out."""
        return self.layout

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        """u and basis of what basis attention sums over the keys; None if the order forms its input itself."""
        first = parameters.edge_layers[0]
        return first.packed(), first.basis

    def form(self, parameters: OperatorParameters, call: Call) -> Tensor:
        """What takes the place of the sums in an order that sums nothing."""
        return self.of_scores(parameters, call.scores(), call.mask)

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The sums for given scores (B,H,M,N), or what takes their place, by the definition."""
        summed = self.to_sum(parameters)
        assert summed is not None, "an order that sums nothing has its own"
        return sums_of_scores(*summed, scores, mask)

    def arguments(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        """What the first edge functions act on for given scores (B,H,M,N): (B,H,M,·)."""
        return scores

    @abstractmethod
    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        """σ v (B,H,M,D), without σ where the identity of SPEC §8 allows it; σ (B,H,M,N) where v is None."""

    def projects(self, parameters: OperatorParameters) -> bool:
        """Whether σ v is the sums, and C, times Wᵀ v and no more, which is one operation: `karat.ops.attend`."""
        return False

    def places_take_part(self, init: str) -> bool:
        """Whether C is drawn, or starts at zero."""
        return True

    def balance(self, parameters: OperatorParameters) -> None:
        """Scale what was drawn so that E Σ_n σ_kn² = 1 for scores of unit variance."""
        self.scale(parameters, self.power(parameters).rsqrt())

    @abstractmethod
    def power(self, parameters: OperatorParameters) -> Tensor:
        """E Σ_n σ_kn² (H,) for the numbers drawn, scores of unit variance."""

    def scale(self, parameters: OperatorParameters, factor: Tensor) -> None:
        """Multiply σ by a factor (H,) through its last map."""
        scale_edges(parameters.edge_layers[-1], factor[:, None, None])

    @abstractmethod
    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        """How a step changes an output that starts as large as `size`, a share of V's; see `karat.operator.rates`."""


def sums_of_scores(u: Tensor, basis: Basis, scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Φ(scores) by the definition, a range of queries at a time: u (H,F,Q,P), (B,H,M,Q) -> (B,H,M,P)."""
    B, H, M, N = scores.shape
    width = basis.num_parameters if isinstance(basis, LinearBasis) else u.shape[-1]
    rows = M if torch.compiler.is_exporting() else max(1, CHUNK_NUMBERS // max(1, B * H * N * width))  # B may be open
    masks = (mask,) * max(1, -(-M // rows)) if mask is None or mask.shape[2] == 1 else mask.split(rows, dim=2)
    chunks = [
        basis_contraction(part, u, basis, mask=keep, impl="reference")
        for part, keep in zip(scores.split(rows, dim=2), masks, strict=True)
    ]
    return torch.cat(chunks, dim=2)


def through_projector(parameters: OperatorParameters, hidden: Tensor, v: Tensor | None) -> Tensor:
    """σ v = hidden (Wᵀ v), hidden (B,H,M,R); σ = hidden Wᵀ where v is None."""
    if v is None:
        return hidden @ parameters.projector_as(hidden).transpose(-2, -1)
    return low_rank_product(hidden, parameters.projector_as(v), v)
