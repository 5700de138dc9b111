"""The orders in which Φ and W are composed, and the registry of all of them, controls included."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.operator.controls import Pointwise, PointwiseWithPlaces, Row, Static, StaticFull
from karat.operator.edges import EdgeLayer
from karat.operator.layout import QUERIES, RANK, TOKENS, Layout
from karat.operator.order import Order, sums_of_scores, through_projector
from karat.operator.parameters import OperatorParameters, Settings
from karat.operator.power import (
    SAMPLES,
    edge_moments,
    edges_power,
    moments_after,
    moments_with_places,
    projected_power,
    scale_edges,
    scale_map,
)
from karat.operator.rates import Gains, hidden_size, layer_gain, moments, projector_gain, scores_gain, values_gain
from karat.operator.simplex import simplex_projection
from karat.ops import Call, basis_contraction
from karat.ops.products import shared_product

FEW_TOKENS = 64  # up to here what the last layer sees is neither normal nor independent enough: it's sampled


class WPhi(Order):
    """σ = W Φ̂(A), Φ̂ with R×N edges and W (N,R): the default."""

    name: ClassVar[str] = "WPhi"
    layout: ClassVar[Layout] = Layout(((TOKENS, RANK),), W=(TOKENS, RANK), C=(QUERIES, RANK))

    def refuses(self, config: Settings) -> str | None:
        return None

    def layout_for(self, config: Settings) -> Layout:
        return self.layout if config.position else self.layout._replace(C=None)

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        hidden = sums if parameters.C is None else sums + parameters.places_as(sums)
        if parameters.config.simplex == "rank":
            hidden = simplex_projection(hidden)
        return through_projector(parameters, hidden, v)

    def projects(self, parameters: OperatorParameters) -> bool:
        return parameters.config.simplex is None

    def places_take_part(self, init: str) -> bool:
        # beside a gate of zero a C of zero left the curve of a training what it is without C
        return init == "default"

    def balance(self, parameters: OperatorParameters) -> None:
        _to_unit_power(parameters.edge_layers[0])
        super().balance(parameters)

    def power(self, parameters: OperatorParameters) -> Tensor:
        mean, power = edge_moments(parameters.edge_layers[0])
        if parameters.places is not None:
            mean, power = moments_with_places(mean, power, parameters.places)
        if parameters.config.simplex == "rank":
            mean, power = moments_after(simplex_projection, mean, power)
        assert parameters.W is not None
        return projected_power(parameters.W, power)

    def scale(self, parameters: OperatorParameters, factor: Tensor) -> None:
        scale_map(parameters.W, factor)

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        layer, N = parameters.edge_layers[0], parameters.num_tokens
        hidden = hidden_size(layer, N)
        sum_to_one = parameters.config.simplex == "rank"
        W = values_gain(N) if sum_to_one else projector_gain(layer.outputs, hidden, N)
        return Gains((layer_gain(layer) / hidden,), W / size)


class Full(Order):
    """σ = Φ(A), Φ with N×N edges, no W."""

    name: ClassVar[str] = "WPhi"
    has_rank: ClassVar[bool] = False
    layout: ClassVar[Layout] = Layout(((TOKENS, TOKENS),))
    gives_sigma: ClassVar[bool] = True

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        layer = parameters.edge_layers[0]
        if v is None or not isinstance(layer.basis, LinearBasis):  # the identity needs linearity; σ is streamed
            return layer.packed(), layer.basis
        return _values_as_parameters(layer, v), layer.basis

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        return sums if v is None or isinstance(parameters.edge_layers[0].basis, LinearBasis) else sums @ v

    def power(self, parameters: OperatorParameters) -> Tensor:
        return edges_power(parameters.edge_layers[0], parameters.num_tokens)[1]

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        return Gains((layer_gain(parameters.edge_layers[0]) * values_gain(parameters.num_tokens) / size,))


class _EdgesLast(Order):
    """σ_n = Σ_r φ_nr(hidden_r): R numbers of each query, then N×R edges."""

    def finish(self, parameters: OperatorParameters, sums: Tensor, v: Tensor | None) -> Tensor:
        layer, impl = parameters.edge_layers[-1], parameters.config.impl
        if v is None:
            return sums_of_scores(layer.packed(), layer.basis, sums)
        if not isinstance(layer.basis, LinearBasis):
            return basis_contraction(sums, layer.packed(), layer.basis, impl=impl) @ v
        return basis_contraction(sums, _values_as_parameters(layer, v), layer.basis, impl=impl)

    def power(self, parameters: OperatorParameters) -> Tensor:
        layer, N = parameters.edge_layers[-1], parameters.num_tokens
        if N > FEW_TOKENS and layer.inputs <= N:
            return self._integrated(parameters)
        weight = parameters.edge_layers[0].packed()
        scores = torch.randn(1, weight.shape[0], SAMPLES, N, dtype=weight.dtype, device=weight.device)
        sigma = self.finish(parameters, self.of_scores(parameters, scores, None), None)
        return sigma.double().square().sum(-1).mean((0, 2))

    def _integrated(self, parameters: OperatorParameters) -> Tensor:
        """`power` where the R numbers are near normal and independent."""
        return edge_moments(parameters.edge_layers[-1], diagonal=True)[1].sum(-1)


class PhiW(_EdgesLast):
    """σ = Φ(W A): W (R,N) maps a row of scores to R numbers, Φ with N×R edges maps them to σ's row.

    W is absorbed into the keys, (W A)_k = scale·q_k (W K)ᵀ + W bias_k: linear in N. A mask of pairs can't be
    absorbed: the scores are formed then.
    """

    name: ClassVar[str] = "PhiW"
    argument: ClassVar[str] = "(W·scores)_q"
    layout: ClassVar[Layout] = Layout(((RANK, TOKENS),), W=(RANK, TOKENS))

    def to_sum(self, parameters: OperatorParameters, v: Tensor | None = None) -> tuple[Tensor, Basis] | None:
        return None

    def form(self, parameters: OperatorParameters, call: Call) -> Tensor:
        q, k, scale, bias, mask = call
        if mask is not None and mask.shape[2] > 1:
            return super().form(parameters, call)
        if mask is not None:
            k = torch.where(mask.transpose(-2, -1), k, 0)
        projected = q @ shared_product(parameters.projector_as(k), k).transpose(-2, -1) * scale  # (B,H,M,R)
        if bias is None:
            return projected
        bias = bias.to(projected.dtype).expand(*bias.shape[:3], k.shape[2])
        bias = bias if mask is None else torch.where(mask, bias, 0)
        return projected + bias @ parameters.projector_as(bias).transpose(-2, -1)

    def of_scores(self, parameters: OperatorParameters, scores: Tensor, mask: Tensor | None) -> Tensor:
        scores = scores if mask is None else torch.where(mask, scores, 0)
        return scores @ parameters.projector_as(scores).transpose(-2, -1)

    arguments = of_scores

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        layer, N = parameters.edge_layers[0], parameters.num_tokens
        return Gains((layer_gain(layer) * values_gain(N) / size,), scores_gain(N) * moments(layer.basis).slope)


class PhiPhi(_EdgesLast):
    """σ = Φ₂(Φ₁(A)): R×N edges, then N×R edges, no W."""

    name: ClassVar[str] = "PhiPhi"
    layout: ClassVar[Layout] = Layout(((TOKENS, RANK), (RANK, TOKENS)))

    def balance(self, parameters: OperatorParameters) -> None:
        _to_unit_power(parameters.edge_layers[0])
        super().balance(parameters)

    def _integrated(self, parameters: OperatorParameters) -> Tensor:
        """Φ₂ sees what Φ₁ is: a sum over many keys, near normal, with a mean of its own."""
        mean, power = edge_moments(parameters.edge_layers[0])
        spread = (power.diagonal(dim1=-2, dim2=-1) - mean.square()).clamp(min=0).sqrt()
        return edge_moments(parameters.edge_layers[1], lambda z: mean + spread * z, diagonal=True)[1].sum(-1)

    def gains(self, parameters: OperatorParameters, size: float) -> Gains:
        first, last = parameters.edge_layers
        second = layer_gain(last) * values_gain(parameters.num_tokens) / size
        return Gains((layer_gain(first) * moments(last.basis).slope, second))


def _values_as_parameters(layer: EdgeLayer, v: Tensor) -> Tensor:
    """A layer's u (H,F,Q,N) and v (B,H,N,D) -> (B,H,F,Q,D), U_f,q = Σ_n u_f,q,n v_n."""
    u = layer.stacked()
    return shared_product(u.to(v.dtype).flatten(1, 2), v).unflatten(2, u.shape[1:3]) * layer.factor.to(v.dtype)


def _to_unit_power(layer: EdgeLayer) -> None:
    """Let each of the R numbers of Φ̂ have E y² = 1."""
    scale_edges(layer, edge_moments(layer)[1].diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(1))


# A new order is one line here; it is found by its name and whether there is a rank.
ORDERS: dict[tuple[str, bool], Order] = {
    (order.name, order.has_rank): order
    for order in (
        *(WPhi(), Full(), PhiW(), PhiPhi()),
        *(Pointwise(), PointwiseWithPlaces()),
        *(Static(), StaticFull(), Row()),
    )
}
BLIND = tuple(dict.fromkeys(order.name for order in ORDERS.values() if not order.layout.layers))
