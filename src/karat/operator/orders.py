"""The orders in which Φ and W are composed, each a small strategy around the operator's parameters (SPEC §1, §8).

Every order sees the scores in two ways: as they are (`hidden_of_scores`) or as q and k that basis attention may
stream (`hidden`). What follows from the hidden values (B,H,M,·) is either σ itself or its product with v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.operator.edges import EdgeLayer
from karat.operator.inputs import Products
from karat.operator.simplex import simplex_projection
from karat.ops import basis_attention, basis_contraction, joint_attention
from karat.ops.products import product_for_tokens, shared_product

if TYPE_CHECKING:
    from karat.operator.operator import KArAtOperator

# Numbers that op(scores) may hold at a time in a feature or edge tensor when no graph is recorded.
CHUNK_NUMBERS = 1 << 25


class SumsOverKeys(Protocol):
    """`karat.basis_attention`, or what computes the same beside something else."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        u: Tensor,
        basis: str | Basis,
        *,
        scale: float | None,
        bias: Tensor | None,
        mask: Tensor | None,
        impl: str,
    ) -> Tensor: ...


class BesideSoftmax:
    """Basis attention that attends to v by softmax over the same scores, in one pass: `attended`, once called."""

    def __init__(self, v: Tensor) -> None:
        self.v = v

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        u: Tensor,
        basis: str | Basis,
        *,
        scale: float | None,
        bias: Tensor | None,
        mask: Tensor | None,
        impl: str,
    ) -> Tensor:
        self.attended, sums = joint_attention(
            q,
            k,
            self.v,
            u,
            basis,
            scale=scale,
            bias=bias,
            mask=mask,
            impl=impl,
        )
        return sums


class Order(ABC):
    """How Φ and W make σ out of the scores.

    The first edge layer sums over keys; `sums` says by what (see `SumsOverKeys`).
    """

    streams_scores: ClassVar[bool] = True  # whether the first edge layer sees the scores themselves, as softmax does
    # (inputs, outputs) of each edge layer, in letters: N and R, A for one of all keys, 1 for one
    layer_shapes: ClassVar[tuple[str, ...]]
    projector_shape: ClassVar[str | None]  # W's, in letters
    position_shape: ClassVar[str | None] = None  # C's where the order itself has one: (queries, outputs), in letters
    gives_sigma: ClassVar[bool] = False  # whether the hidden values are σ itself

    @abstractmethod
    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        """What the scores scale·qkᵀ + bias become before the last map: (B,H,M,R), or σ itself where `gives_sigma`."""

    @abstractmethod
    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The same for given scores (B,H,M,N)."""

    @abstractmethod
    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        """σ (B,H,M,N)."""

    @abstractmethod
    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        """σ v (B,H,M,D), without σ where the identity of SPEC §8 allows it."""

    def attend(
        self, op: KArAtOperator, seen: Products, v: Tensor, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        """σ(scale·qkᵀ + bias) v; the mask is one of keys, already applied to v."""
        return self.apply(op, self.hidden(op, seen, mask, sums), v)


def _stream(op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys) -> Tensor:
    first = op.edge_layers[0]
    return summed(op, first.packed(), first.basis, seen, mask, sums)


def summed(
    op: KArAtOperator,
    u: Tensor,
    basis: Basis,
    seen: Products,
    mask: Tensor | None,
    sums: SumsOverKeys = basis_attention,
) -> Tensor:
    """Basis attention to what is seen, with parameters u; by `sums`."""
    return sums(seen.q, seen.k, u, basis, scale=seen.scale, bias=seen.bias, mask=mask, impl=op.config.impl)


def _sum_of_edges(layer: EdgeLayer, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Φ(scores) by the definition, a range of queries at a time: (B,H,M,Q) -> (B,H,M,P)."""
    u = layer.packed()
    B, H, M, N = scores.shape
    width = layer.basis.num_parameters if isinstance(layer.basis, LinearBasis) else layer.outputs
    rows = M if torch.compiler.is_exporting() else max(1, CHUNK_NUMBERS // max(1, B * H * N * width))  # B may be open
    masks = (mask,) * max(1, -(-M // rows)) if mask is None or mask.shape[2] == 1 else mask.split(rows, dim=2)
    chunks = [
        basis_contraction(part, u, layer.basis, mask=keep, impl="reference")
        for part, keep in zip(scores.split(rows, dim=2), masks, strict=True)
    ]
    return torch.cat(chunks, dim=2)


def _last_layer(layer: EdgeLayer, hidden: Tensor, v: Tensor, impl: str) -> Tensor:
    """σ v for σ_n = Σ_r φ_nr(hidden_r): U_f,r = Σ_n c_f,n,r v_n if the basis is linear, else through σ."""
    if not isinstance(layer.basis, LinearBasis):
        return basis_contraction(hidden, layer.packed(), layer.basis, impl=impl) @ v
    return basis_contraction(hidden, _values_as_parameters(layer, v), layer.basis, impl=impl)


def _values_as_parameters(layer: EdgeLayer, v: Tensor) -> Tensor:
    """A layer's u (H,F,Q,N) and v (B,H,N,D) -> (B,H,F,Q,D), U_f,q = Σ_n u_f,q,n v_n."""
    u = layer.stacked()
    return shared_product(u.to(v.dtype).flatten(1, 2), v).unflatten(2, u.shape[1:3]) * layer.factor.to(v.dtype)


class WPhi(Order):
    """σ = W Φ̂(A), Φ̂ with R×N edges and W (N,R): the default."""

    layer_shapes: ClassVar[tuple[str, ...]] = ("NR",)
    projector_shape: ClassVar[str | None] = "NR"

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return self._shaped(op, _stream(op, seen, mask, sums))

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self._shaped(op, _sum_of_edges(op.edge_layers[0], scores, mask))

    def _shaped(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        """All that happens between the sums over the keys (B,H,M,R) and W: position, simplex="rank"."""
        if op.config.position is not None:
            hidden = hidden + op.places_as(hidden)
        return simplex_projection(hidden) if op.config.simplex == "rank" else hidden

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return hidden @ op.projector_as(hidden).transpose(-2, -1)

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        projected = shared_product(op.projector_as(v).transpose(-2, -1), v)  # (B,H,R,D)
        return product_for_tokens(hidden, projected)


class Full(Order):
    """σ = Φ(A), Φ with N×N edges, no W."""

    layer_shapes: ClassVar[tuple[str, ...]] = ("NN",)
    projector_shape: ClassVar[str | None] = None
    gives_sigma: ClassVar[bool] = True

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return _stream(op, seen, mask, sums)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        return _sum_of_edges(op.edge_layers[0], scores, mask)

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return hidden

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return hidden @ v

    def attend(
        self, op: KArAtOperator, seen: Products, v: Tensor, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        layer = op.edge_layers[0]
        if not isinstance(layer.basis, LinearBasis):  # the identity needs linearity; σ is streamed, then multiplied
            return super().attend(op, seen, v, mask, sums)
        return summed(op, _values_as_parameters(layer, v), layer.basis, seen, mask, sums)


class PhiW(Order):
    """σ = Φ(W A): W (R,N) maps a row of scores to R numbers, Φ with N×R edges maps them to σ's row.

    W is absorbed into the keys, (W A)_k = scale·q_k (W K)ᵀ + W bias_k: linear in N. A mask of pairs can't be
    absorbed: the scores are formed then.
    """

    streams_scores: ClassVar[bool] = False
    layer_shapes: ClassVar[tuple[str, ...]] = ("RN",)
    projector_shape: ClassVar[str | None] = "RN"

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        if mask is not None and mask.shape[2] > 1:
            return self.hidden_of_scores(op, seen.scores(), mask)
        q, k, scale, bias = seen
        if mask is not None:
            k = torch.where(mask.transpose(-2, -1), k, 0)
        projected = q @ shared_product(op.projector_as(k), k).transpose(-2, -1) * scale  # (B,H,M,R)
        if bias is None:
            return projected
        bias = bias.to(projected.dtype).expand(*bias.shape[:3], k.shape[2])
        bias = bias if mask is None else torch.where(mask, bias, 0)
        return projected + bias @ op.projector_as(bias).transpose(-2, -1)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        scores = scores if mask is None else torch.where(mask, scores, 0)
        return scores @ op.projector_as(scores).transpose(-2, -1)

    def sigma(self, op: KArAtOperator, hidden: Tensor) -> Tensor:
        return _sum_of_edges(op.edge_layers[-1], hidden, None)

    def apply(self, op: KArAtOperator, hidden: Tensor, v: Tensor) -> Tensor:
        return _last_layer(op.edge_layers[-1], hidden, v, op.config.impl)


class PhiPhi(PhiW):
    """σ = Φ₂(Φ₁(A)): R×N edges, then N×R edges, no W."""

    streams_scores: ClassVar[bool] = True
    layer_shapes: ClassVar[tuple[str, ...]] = ("NR", "RN")
    projector_shape: ClassVar[str | None] = None

    def hidden(
        self, op: KArAtOperator, seen: Products, mask: Tensor | None, sums: SumsOverKeys = basis_attention
    ) -> Tensor:
        return _stream(op, seen, mask, sums)

    def hidden_of_scores(self, op: KArAtOperator, scores: Tensor, mask: Tensor | None) -> Tensor:
        return _sum_of_edges(op.edge_layers[0], scores, mask)


ORDERS: dict[str, Order] = {"WPhi": WPhi(), "PhiW": PhiW(), "PhiPhi": PhiPhi()}
FULL = Full()
