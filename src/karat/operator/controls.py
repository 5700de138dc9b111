"""Operators that lack what the others have: keys told apart, eyes for the scores, queries told apart.

They say where a gain comes from. `Pointwise` learns a function of the scores and knows no position, or adds static
mixing to it; `Static` mixes positions and is blind to the scores, as the random Synthesizer is (Tay et al. 2020, arXiv
2005.00743); `Row` doesn't even tell queries apart. Beside softmax or in place of heads they take all the settings that
make sense for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from karat.basis import LinearBasis
from karat.operator.config import ROW, STATIC, KArAtConfig
from karat.operator.inputs import Products
from karat.operator.orders import FULL, ORDERS, Order, SumsOverKeys, summed
from karat.ops import basis_attention
from karat.ops.products import shared_product

if TYPE_CHECKING:
    from karat.operator.operator import KArAtOperator

# From this many keys on a linear pointwise operator is streamed. The identity costs F times the multiply-adds of one
# product with v; below, σ is small and is formed.
STREAMED_FROM = 1024


class Pointwise(Order):
    """σ_kn = φ(A_kn), one learned function a head for every pair: no W, no rank."""

    streams_scores: ClassVar[bool] = False  # some sizes form them
    layer_shapes: ClassVar[tuple[str, ...]] = ("A1",)
    projector_shape: ClassVar[str | None] = None
    gives_sigma: ClassVar[bool] = True

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return self.hidden_of_scores(op, seen.scores(), mask)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        """φ of every score: to basis attention each is a query of width one beside a single key, 1."""
        layer = op.edge_layers[0]
        pairs = scores.flatten(2).unsqueeze(-1)  # (B,H,M·N,1)
        one = pairs.new_ones(*pairs.shape[:2], 1, 1)
        # Kernels are made for many keys and outputs; with one of each the elementwise path is faster.
        impl = "tiled" if op.config.impl == "auto" else op.config.impl
        sigma = basis_attention(pairs, one, layer.packed(), layer.basis, scale=1.0, impl=impl)
        sigma = sigma.view(scores.shape).to(scores.dtype)
        return sigma if mask is None else torch.where(mask, sigma, 0)

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return hidden

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return hidden @ v

    def attend(
        self, op: KArAtOperator, seen: Products, v: Tensor, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        layer = op.edge_layers[0]
        if seen.k.shape[2] < STREAMED_FROM or not isinstance(layer.basis, LinearBasis):
            return super().attend(op, seen, v, mask, sums)
        u = layer.packed().to(v.dtype) * v.unsqueeze(2)  # U_f,n = c_f v_n: (H,F,1,1), (B,H,1,N,D) -> (B,H,F,N,D)
        return summed(op, u, layer.basis, seen, mask)


class StaticFull(Order):
    """σ = C, a learned N×N matrix for each head: the random Synthesizer (Tay et al. 2020, arXiv 2005.00743), whose
    softmax over the rows of C is left out."""

    streams_scores: ClassVar[bool] = False
    layer_shapes: ClassVar[tuple[str, ...]] = ()
    projector_shape: ClassVar[str | None] = None
    position_shape: ClassVar[str | None] = "NN"
    gives_sigma: ClassVar[bool] = True

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return _for_each_image(op, seen.q)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        return _for_each_image(op, scores)

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return hidden

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return shared_product(op.places_as(v), v)


class Static(StaticFull):
    """σ = C Wᵀ with C and W (N,R): what is left of order WPhi with position="query" when the edges are zero.

    The factorised random Synthesizer (Tay et al. 2020, arXiv 2005.00743), without its softmax over the rows.
    """

    projector_shape: ClassVar[str | None] = "NR"
    position_shape: ClassVar[str | None] = "NR"
    gives_sigma: ClassVar[bool] = False

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return ORDERS["WPhi"].sigma(op, hidden)

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return _places_product(op, v)


class PointwiseWithPlaces(Pointwise):
    """σ = φ(A) + C Wᵀ: what scores and places bring where neither looks at the other."""

    projector_shape: ClassVar[str | None] = "NR"

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        places = op.places_as(scores) @ op.projector_as(scores).transpose(-2, -1)  # (H,N,N)
        return super().hidden_of_scores(op, scores, mask) + (places if mask is None else torch.where(mask, places, 0))

    def attend(
        self, op: KArAtOperator, seen: Products, v: Tensor, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return POINTWISE.attend(op, seen, v, mask, sums) + _places_product(op, v)


class Row(Order):
    """σ_kn = W_n, one learned row a head: the same weighted mean of the values for every query."""

    streams_scores: ClassVar[bool] = False
    layer_shapes: ClassVar[tuple[str, ...]] = ()
    projector_shape: ClassVar[str | None] = "N1"

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return seen.q.new_ones(*seen.q.shape[:3], 1)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.new_ones(*scores.shape[:3], 1)

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return ORDERS["WPhi"].sigma(op, hidden)

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return ORDERS["WPhi"].apply(op, hidden, v)


def _places_product(op: KArAtOperator, v: Tensor) -> Tensor:
    """C Wᵀ v (B,H,N,D)."""
    return shared_product(op.places_as(v), shared_product(op.projector_as(v).transpose(-2, -1), v))


def _for_each_image(op: KArAtOperator, like: Tensor) -> Tensor:
    """C in the precision of `like` (B,...), the same for each image: (B,H,N,·)."""
    C = op.places_as(like)
    return C.expand(like.shape[0], *C.shape)


POINTWISE = Pointwise()
LOW_RANK: dict[str, Order] = {**ORDERS, "Pointwise": PointwiseWithPlaces(), STATIC: Static()}
FULL_RANK: dict[str, Order] = {"WPhi": FULL, "Pointwise": POINTWISE, STATIC: StaticFull(), ROW: Row()}


def order_of(config: KArAtConfig) -> Order:
    """How the operator of a configuration makes σ out of the scores."""
    return (FULL_RANK if config.rank is None else LOW_RANK)[config.basis if config.is_static else config.order]
