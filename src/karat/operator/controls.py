"""Operators that lack what the others have: keys told apart, eyes for the scores, queries told apart.

They say where a gain comes from. `Pointwise` learns a function of the scores and knows no position, or adds static
mixing to it; `Static` mixes positions and is blind to the scores, as the random Synthesizer is (Tay et al. 2020, arXiv
2005.00743); `Row` doesn't even tell queries apart. Beside softmax or in place of heads they take all the settings that
make sense for them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.operator.layout import ALL, ONE, QUERIES, RANK, TOKENS, Layout
from karat.operator.order import NO_HIDDEN, Order, through_projector
from karat.operator.parameters import OperatorParameters, Settings
from karat.operator.power import edges_power, projected_power, rows_power, scale_edges, scale_map
from karat.operator.rates import Gains, hidden_size, moments, projector_gain, values_gain
from karat.ops import Call, basis_attention
from karat.ops.products import shared_product
from karat.ops.transforms import looked_through

# From this many keys on a linear pointwise operator is streamed. The identity costs F times the multiply-adds of one
# product with v; below, σ is small and is formed.
STREAMED_FROM = 1024


class Pointwise(Order):
    """σ_kn = φ(A_kn), one learned function a head for every pair: no W, no rank."""

    name: ClassVar[str] = "Pointwise"
    has_rank: ClassVar[bool] = False
    layout: ClassVar[Layout] = Layout(((ALL, ONE),))
    gives_sigma: ClassVar[bool] = True

    def refuses(self, config: Settings) -> str | None:
        if config.position:
            return "position=query beside a function that all keys share is static mixing: give its rank"
        return super().refuses(config)

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        if v is None or not self._folds(parameters, v):
            return None
        layer = parameters.edge_layers[0]
        # U_f,n = c_f v_n: (H,F,1,1), (B,H,1,N,D) -> (B,H,F,N,D)
        return layer.packed().to(v.dtype) * v.unsqueeze(2), layer.basis

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        """φ of every score: to basis attention each is a query of width one beside a single key, 1."""
        layer, impl = parameters.edge_layers[0], parameters.config.impl
        pairs = scores.flatten(2).unsqueeze(-1)  # (B,H,M·N,1)
        one = pairs.new_ones(*pairs.shape[:2], 1, 1)
        # Kernels are made for many keys and outputs; with one of each the elementwise path is faster.
        u = layer.packed()
        impl = "tiled" if impl == "auto" and not looked_through(pairs, u) else impl
        sigma = basis_attention(pairs, one, u, layer.basis, scale=1.0, impl=impl)
        sigma = sigma.view(scores.shape).to(scores.dtype)
        return sigma if mask is None else torch.where(mask, sigma, 0)

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return sums if v is None or self._folds(parameters, v) else sums @ v

    def _folds(self, parameters: OperatorParameters, v: Tensor) -> bool:
        return v.shape[2] >= STREAMED_FROM and isinstance(parameters.edge_layers[0].basis, LinearBasis)

    def power(self, parameters: OperatorParameters) -> Tensor:
        return edges_power(parameters.edge_layers[0], parameters.num_tokens)[1]

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        # its numbers have one sign each for all keys
        return Gains((math.sqrt(parameters.num_tokens * moments(parameters.edge_layers[0].basis).power) / size,))


class PointwiseWithPlaces(Pointwise):
    """σ = φ(A) + C Wᵀ: what scores and places bring where neither looks at the other."""

    has_rank: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(((ALL, ONE),), W=(TOKENS, RANK), C=(QUERIES, RANK))

    def refuses(self, config: Settings) -> str | None:
        if config.position is None:
            return (
                f"order='Pointwise' has one function a head and no rank: write rank=None, not {config.rank!r}, or add "
                "position='query', static mixing of that rank"
            )
        return NO_HIDDEN if config.simplex == "rank" else None

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return super().finish(parameters, sums, v) + _places(parameters, sums if v is None else v, v)

    def balance(self, parameters: OperatorParameters) -> None:
        scale_edges(parameters.edge_layers[0], super().power(parameters).rsqrt()[:, None, None])
        self._match_places(parameters)
        super().balance(parameters)
        self._match_places(parameters)  # anew: a base activation without a scale stays what it is

    def _match_places(self, parameters: OperatorParameters) -> None:
        """Give C Wᵀ the power that the edges have."""
        scale_map(parameters.W, (super().power(parameters) / rows_power(_sigma_of_places(parameters))).sqrt())

    def power(self, parameters: OperatorParameters) -> Tensor:
        mean, power = edges_power(parameters.edge_layers[0], parameters.num_tokens)
        places = _sigma_of_places(parameters)
        return power + 2 * mean * places.sum(-1).mean(-1) + rows_power(places)

    def scale(self, parameters: OperatorParameters, factor: Tensor) -> None:
        super().scale(parameters, factor)
        scale_map(parameters.W, factor)

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        N = parameters.num_tokens
        W = projector_gain(parameters.config.rank or 1, hidden_size(parameters.edge_layers[0], N), N) / size
        return super().gains(parameters, size)._replace(W=W)


class Static(Order):
    """σ = C Wᵀ with C and W (N,R): what is left of order WPhi with position="query" when the edges are zero.

    The factorised random Synthesizer (Tay et al. 2020, arXiv 2005.00743), without its softmax over the rows.
    """

    name: ClassVar[str] = "static"
    layout: ClassVar[Layout] = Layout((), W=(TOKENS, RANK), C=(QUERIES, RANK))

    def refuses(self, config: Settings) -> str | None:
        if config.simplex == "rank":
            return "simplex='rank' acts on sums over the scores; static mixing is blind to them: use 'row'"
        return None

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        return None

    def form(self, parameters: OperatorParameters, call: Call) -> Tensor:
        return self.of_scores(parameters, call.q, call.mask)

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        """C in the precision of the scores, or queries, the same for each image: (B,H,N,·)."""
        C = parameters.places_as(scores)
        return C.expand(scores.shape[0], *C.shape)

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return through_projector(parameters, sums, None) if v is None else _places(parameters, v, v)

    def projects(self, parameters: OperatorParameters) -> bool:
        """Beside softmax, whose kernel takes C Wᵀ v along."""
        mixes = parameters.C is not None and parameters.W is not None
        return mixes and parameters.config.residual is not None and parameters.config.simplex is None

    def power(self, parameters: OperatorParameters) -> Tensor:
        assert parameters.W is not None
        assert parameters.C is not None
        C = parameters.C.double()
        return projected_power(parameters.W, C.transpose(-2, -1) @ C / parameters.num_tokens)

    def scale(self, parameters: OperatorParameters, factor: Tensor) -> None:
        scale_map(parameters.W, factor)

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        return Gains(W=projector_gain(parameters.config.rank or 1, 1.0, parameters.num_tokens) / size)


class StaticFull(Static):
    """σ = C, a learned N×N matrix for each head: the random Synthesizer (Tay et al. 2020, arXiv 2005.00743), whose
    softmax over the rows of C is left out."""

    has_rank: ClassVar[bool] = False
    layout: ClassVar[Layout] = Layout((), C=(QUERIES, TOKENS))
    gives_sigma: ClassVar[bool] = True

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return sums if v is None else shared_product(parameters.places_as(v), v)

    def power(self, parameters: OperatorParameters) -> Tensor:
        assert parameters.C is not None
        return rows_power(parameters.C.double())

    def scale(self, parameters: OperatorParameters, factor: Tensor) -> None:
        scale_map(parameters.C, factor)

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        return Gains(C=values_gain(parameters.num_tokens) / size)


class Row(Static):
    """σ_kn = W_n, one learned row a head: the same weighted mean of the values for every query."""

    name: ClassVar[str] = "row"
    has_rank: ClassVar[bool] = False
    title: ClassVar[str] = "a row that all queries share"
    layout: ClassVar[Layout] = Layout((), W=(TOKENS, ONE))

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.new_ones(*scores.shape[:3], 1)

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return through_projector(parameters, sums, v)

    def power(self, parameters: OperatorParameters) -> Tensor:
        assert parameters.W is not None
        return parameters.W.double().square().sum((-2, -1))

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        return Gains(W=values_gain(parameters.num_tokens) / size)


def _places(parameters: OperatorParameters, like: Tensor, v: Tensor | None) -> Tensor:
    """C Wᵀ v (B,H,N,D), or C Wᵀ (H,N,N) where v is None, in the precision of `like`."""
    C, Wt = parameters.places_as(like), parameters.projector_as(like).transpose(-2, -1)
    return C @ Wt if v is None else shared_product(C, shared_product(Wt, v))


def _sigma_of_places(parameters: OperatorParameters) -> Tensor:
    """C Wᵀ (H,N,N) in float64."""
    assert parameters.places is not None
    assert parameters.projector is not None
    return parameters.places.double() @ parameters.projector.double().transpose(-2, -1)
