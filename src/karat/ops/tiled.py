"""Basis attention tile by tile, in plain PyTorch on any device.

A tile is a few (image, query) rows of one head. Scores and features of one tile are all that exists at a time;
the backward pass recomputes them. Nothing of size N² is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.ops import reference

# Numbers of one tile's feature buffer: about the size of a core's second-level cache on a CPU, and on other
# devices enough to fill them. Found by measurement: benchmarks/tile_size.py.
TILE_NUMBERS = {"cpu": 1 << 19}
TILE_NUMBERS_ELSEWHERE = 1 << 26


class Tile(NamedTuple):
    """One head, a range of images, a range of queries."""

    head: int
    images: slice
    queries: slice


def tiles(q: Tensor, numbers_per_row: int) -> Iterator[Tile]:
    """Cut (B,H,M) into tiles whose rows need `numbers_per_row` buffer entries each, head by head."""
    images, heads, queries = q.shape[:3]
    rows = max(1, TILE_NUMBERS.get(q.device.type, TILE_NUMBERS_ELSEWHERE) // max(1, numbers_per_row))
    deep = max(1, min(images, rows // max(1, queries)))
    wide = queries if rows >= queries else rows
    for head in range(heads):
        for first in range(0, images, deep):
            for start in range(0, queries, wide):
                yield Tile(head, slice(first, first + deep), slice(start, start + wide))


def _part(x: Tensor | None, tile: Tile) -> Tensor | None:
    """The tile's part of a bias or mask (B|1,H|1,M|1,N|1), as (images|1, queries|1, N|1)."""
    if x is None:
        return None
    head = x[:, tile.head if x.shape[1] > 1 else 0]
    head = head[tile.images] if head.shape[0] > 1 else head
    return head[:, tile.queries] if head.shape[1] > 1 else head


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, tile: Tile, dtype: torch.dtype) -> Tensor:
    rows = q[tile.images, tile.head, tile.queries].to(dtype)
    keys = k[tile.images, tile.head].to(dtype)
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)  # (images, queries, N)
    part = _part(bias, tile)
    return scores if part is None else scores.add_(part)


def _weights(u: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """u of the tile: (1 or images, F, N, E)."""
    return (u[tile.head].unsqueeze(0) if u.dim() == 4 else u[tile.images, tile.head]).to(dtype)


def _product(features: Tensor, weights: Tensor) -> Tensor:
    """(images, m, F·N) with (1|images, F·N, E): one large matrix product where the weights are shared."""
    if weights.shape[0] == 1:
        return (features.flatten(0, 1) @ weights[0]).unflatten(0, features.shape[:2])
    return torch.bmm(features, weights)


def _numbers_per_row(basis: Basis, k: Tensor, u: Tensor) -> int:
    # An edge function that isn't linear is evaluated for every key and output, and has F gradients of that size.
    width = 1 if isinstance(basis, LinearBasis) else u.shape[-1]
    return k.shape[2] * basis.num_parameters * width


def forward(
    q: Tensor, k: Tensor, u: Tensor, basis: Basis, scale: float, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """out (B,H,M,E) in q's precision; see `karat.basis_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:3], u.shape[-1])
    for tile in tiles(q, _numbers_per_row(basis, k, u)):
        scores = _scores(q, k, scale, bias, tile, dtype)
        weights = _weights(u, tile, dtype)
        keep = _part(mask, tile)
        if isinstance(basis, LinearBasis):
            psi = _features(basis, scores, keep)
            out[tile.images, tile.head, tile.queries] = _product(psi.flatten(2), weights.flatten(1, 2))
        else:
            out[tile.images, tile.head, tile.queries] = _contract(scores, weights, basis, keep)
    return out


def _features(basis: LinearBasis, scores: Tensor, keep: Tensor | None) -> Tensor:
    """ψ (images, m, F, N), zero where masked; masked scores are set to zero in place."""
    if keep is not None:
        scores.masked_fill_(~keep, 0)
    psi = scores.new_empty(*scores.shape[:2], basis.num_parameters, scores.shape[2])
    basis.write_features(scores, psi)
    return psi if keep is None else psi.masked_fill_(~keep.unsqueeze(-2), 0)


def _contract(scores: Tensor, weights: Tensor, basis: Basis, keep: Tensor | None) -> Tensor:
    """The definition on one tile: (images, m, N), (1|images, F, N, E) -> (images, m, E)."""
    return reference.contract(
        scores.unsqueeze(1), weights.unsqueeze(1), basis, None if keep is None else keep.unsqueeze(1)
    )[:, 0]


class Gradients(NamedTuple):
    """Gradients of basis attention; None where not asked for."""

    q: Tensor | None
    k: Tensor | None
    u: Tensor | None
    bias: Tensor | None


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q, dtype=dtype) if needs[0] else None
    dk = torch.zeros_like(k, dtype=dtype) if needs[1] else None
    du = torch.zeros_like(u, dtype=dtype) if needs[2] else None
    dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[3] else None
    for tile in tiles(q, 2 * _numbers_per_row(basis, k, u)):
        scores = _scores(q, k, scale, bias, tile, dtype)
        weights = _weights(u, tile, dtype)
        keep = _part(mask, tile)
        dout = grad[tile.images, tile.head, tile.queries].to(dtype)
        step = _linear_step if isinstance(basis, LinearBasis) else _nonlinear_step
        dscores, dweights = step(basis, scores, weights, keep, dout, needs[2])  # type: ignore[arg-type]
        if du is not None and dweights is not None:
            part = du[tile.head] if u.dim() == 4 else du[tile.images, tile.head]
            part += dweights[0] if u.dim() == 4 else dweights
        if dbias is not None:
            bias_part = _part(dbias, tile)
            assert bias_part is not None
            bias_part += dscores.sum_to_size(bias_part.shape)
        if dq is not None:
            dq[tile.images, tile.head, tile.queries] = torch.bmm(dscores, k[tile.images, tile.head].to(dtype)).mul_(
                scale
            )
        if dk is not None:
            rows = q[tile.images, tile.head, tile.queries].to(dtype)
            dk[tile.images, tile.head] += torch.bmm(dscores.transpose(1, 2), rows).mul_(scale)
    return Gradients(
        None if dq is None else dq.to(q.dtype),
        None if dk is None else dk.to(k.dtype),
        None if du is None else du.to(u.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _linear_step(
    basis: LinearBasis, scores: Tensor, weights: Tensor, keep: Tensor | None, dout: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = Σ_f ψ_f'(S) ∘ (dO U_fᵀ) and dU_f = ψ_f(S)ᵀ dO of one tile."""
    psi = _features(basis, scores, keep)
    flat = psi.flatten(2)  # (images, m, F·N)
    dweights = None
    if need_weights and weights.shape[0] == 1:
        dweights = (flat.flatten(0, 1).t() @ dout.flatten(0, 1)).view_as(weights)
    elif need_weights:
        dweights = torch.bmm(flat.transpose(1, 2), dout).view_as(weights)
    dpsi = _product(dout, weights.flatten(1, 2).transpose(1, 2)).view_as(psi)
    dscores = basis.pull_back(scores, psi, dpsi)
    return dscores if keep is None else dscores.masked_fill_(~keep, 0), dweights


def _nonlinear_step(
    basis: Basis, scores: Tensor, weights: Tensor, keep: Tensor | None, dout: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = Σ_e ∂φ/∂s ∘ dO_e and dU = Σ_i ∂φ/∂u ∘ dO of one tile, one evaluation per edge."""
    if keep is not None:
        scores.masked_fill_(~keep, 0)
    dphi = dout.unsqueeze(-2)  # (images, m, 1, E)
    if keep is not None:
        dphi = dphi * keep.unsqueeze(-1)
    packed = weights.transpose(0, 1).unsqueeze(2)  # (F, 1|images, 1, N, E)
    dx, du = basis.edge_gradients(scores.unsqueeze(-1), packed, dphi)
    if not need_weights:
        return dx.sum(-1), None
    summed = (0, 1) if weights.shape[0] == 1 else (1,)
    dweights = torch.stack([part.expand_as(dx).sum(summed) for part in du], dim=-3)
    return dx.sum(-1), dweights.view_as(weights)


def unsupported(q: Tensor, u: Tensor, basis: Basis) -> str | None:
    """Serves everything."""
    return None
