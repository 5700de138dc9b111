"""Fixed functions of the scores in softmax's place: what others put there, under their usual names.

They have no edge functions, no rank and, but for `lsa` and `diff`, nothing to learn; `softmax_heads`, `blocks` and
`position_bias` go with most. A masked key counts as absent: it has no weight, and N is the number of keys that a query
may see.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from karat.basis import Basis
from karat.errors import first_line
from karat.operator.layout import Layout
from karat.operator.order import Order
from karat.operator.parameters import OperatorParameters, Settings
from karat.operator.rates import Gains
from karat.operator.simplex import lowered
from karat.ops import Call
from karat.ops.masks import safe_softmax


class Fixed(Order):
    """σ_k = f(A_k), A = q kᵀ/√D, f known beforehand."""

    has_rank: ClassVar[bool] = False
    gives_sigma: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(())
    formula: ClassVar[str]
    paper: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ("blocks", "softmax_heads", "position_bias", "impl")  # settings beside its name
    sees_scores: ClassVar[bool] = True  # whether it is a function of q kᵀ, and so may be an operator

    @abstractmethod
    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        """f of scores (B,H,M,N), at least float32; what it gives to masked keys is of no account."""

    def check(self) -> None:
        """Raise ValueError where something that it needs isn't installed."""

    def refuses(self, config: Settings) -> str | None:
        return None

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        return None

    def form(self, parameters: OperatorParameters, call: Call) -> Tensor:
        scores = call.scores()
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return self.of_scores(parameters, wide, call.mask).to(scores.dtype)

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        sigma = self.weights(parameters, scores, mask)
        return sigma if mask is None else torch.where(mask, sigma, 0)

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return sums if v is None else sums @ v

    def power(self, parameters: OperatorParameters) -> Tensor:
        raise AssertionError("a fixed function isn't drawn")

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        return Gains()


class Sigmoid(Fixed):
    """Each key on its own; the bias lets a row of equal scores sum to about one."""

    name: ClassVar[str] = "sigmoid"
    formula: ClassVar[str] = "sigmoid(A − log N)"
    paper: ClassVar[str] = "2409.04431"

    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        return (scores - _keys(scores, mask).log()).sigmoid()


class ReLU(Fixed):
    """Each key on its own, some of them not at all."""

    name: ClassVar[str] = "relu"
    formula: ClassVar[str] = "max(A, 0) / N"
    paper: ClassVar[str] = "2309.08586"

    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.relu() / _keys(scores, mask)


class Entmax15(Fixed):
    """α-entmax at 1.5, between softmax (1) and sparsemax (2)."""

    name: ClassVar[str] = "entmax15"
    formula: ClassVar[str] = "[A/2 − τ]₊², τ so that the row sums to one"
    paper: ClassVar[str] = "1905.05702"

    def check(self) -> None:
        _of_entmax(self.name)

    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        return _of_entmax(self.name)(scores if mask is None else lowered(scores, mask), dim=-1)


class Sparsemax(Entmax15):
    """The nearest point of the simplex."""

    name: ClassVar[str] = "sparsemax"
    formula: ClassVar[str] = "[A − τ]₊, τ so that the row sums to one"
    paper: ClassVar[str] = "1602.02068"


class LSA(Fixed):
    """Locality self-attention: no token sees itself, and each head learns how sharp it is.

    The paper learns τ, √D at the start, in q kᵀ/τ; here `sharpness` s = √D/τ, one at the start.
    """

    name: ClassVar[str] = "lsa"
    layout: ClassVar[Layout] = Layout((), sharpness=True)
    formula: ClassVar[str] = "softmax(s A) over all keys but the query's own, s learned a head"
    paper: ClassVar[str] = "2112.13492"
    own_key: ClassVar[bool] = True

    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        assert parameters.sharpness is not None
        others = ~torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)[None, None]
        sharp = parameters.sharpness.to(scores.dtype)[:, None, None]
        return safe_softmax(scores * sharp, others if mask is None else others & mask)


class Differential(Fixed):
    """timm's `DiffAttention`, a module of its own (`karat.models.differential`): queries and keys have two halves."""

    name: ClassVar[str] = "diff"
    formula: ClassVar[str] = "softmax(A₁) − λ softmax(A₂), of the halves of q and k, λ learned a block"
    paper: ClassVar[str] = "2410.05258"
    takes: ClassVar[tuple[str, ...]] = ("blocks", "impl")
    sees_scores: ClassVar[bool] = False

    def weights(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        raise AssertionError("no operator is made of it")


def _keys(scores: Tensor, mask: Tensor | None) -> Tensor:
    """How many keys each query may see, at least one: broadcastable to the scores."""
    if mask is None:
        return scores.new_full((1, 1, 1, 1), scores.shape[-1])
    seen = mask.expand(*mask.shape[:3], scores.shape[-1]).sum(-1, keepdim=True)
    return seen.clamp(min=1).to(scores.dtype)


def _of_entmax(name: str) -> Callable[..., Any]:
    try:
        import entmax
    except ImportError as error:
        raise ValueError(
            f"attention={name} needs the package entmax: pip install 'karat[entmax]' ({first_line(error)})"
        ) from None
    return getattr(entmax, name)


# A new function is one line here; its name is that of an attention.
FIXED: dict[str, Fixed] = {
    function.name: function for function in (Sigmoid(), ReLU(), Entmax15(), Sparsemax(), LSA(), Differential())
}
