"""Basis attention tile by tile, in plain PyTorch on any device; with softmax over the same tiles: softmax.py.

A tile is a range of (head, image) pairs, queries and keys. Scores and features of one tile are all that exists at a
time, in buffers that the next tile overwrites; the backward pass recomputes them. Nothing of size N² is kept between
the passes.

For bases that are linear in their parameters a tile's scores lie keys first, (heads·images, n, m), and so do its
features, (heads·images, F, n·m): every feature is one contiguous block, and features and keys together are the one
axis over which the matrix products sum. The narrow side of those products, E, comes first as well: a product with
few rows and long columns runs at twice the speed of one with few columns.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.ops import reference
from karat.ops.cache import cache_bytes
from karat.ops.call import Call, Gradients, Needs
from karat.ops.softmax_part import SoftmaxPart
from karat.ops.tiled.softmax import RunningSoftmax, SoftmaxGradients
from karat.ops.tiled.tiling import Tile, tiles

# Numbers of one tile's features: on a CPU, where a number has four bytes, eight second-level caches full (smaller ones
# lose more to the calls than they gain from the cache); on other devices enough to fill them.
# And the most keys of a tile. Found by measurement: benchmarks/tile_size.py.
TILE_NUMBERS = {"cpu": 2 * cache_bytes()}
TILE_NUMBERS_ELSEWHERE = 1 << 26
TILE_KEYS = {"cpu": 256}
TILE_KEYS_ELSEWHERE = 4096


class _Buffers:
    """Memory that all tiles of a call share, by name; it grows to the largest tile's size."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of that shape with anything in it, valid until the name is taken again."""
        size = prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = self._like.new_empty(size)
        return kept[:size].view(shape)


class _Work:
    """A call head by head, (H,B,·,·), in the precision of the computation; what every tile takes its part of."""

    def __init__(self, call: Call, u: Tensor, basis: Basis) -> None:
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.q, self.k = (x.transpose(0, 1).to(dtype) for x in (call.q, call.k))
        self.u = (u.unsqueeze(1) if u.dim() == 4 else u.transpose(0, 1)).to(dtype)  # (H,1|B,F,N,E)
        self.basis, self.scale, self.bias, self.mask = basis, call.scale, call.bias, call.mask
        self.buffers = _Buffers(self.q)

    def tiles(self) -> list[Tile]:
        # An edge function that isn't linear is evaluated for every pair and output, and has F gradients of that size.
        width = 1 if isinstance(self.basis, LinearBasis) else self.u.shape[-1]
        device = self.q.device.type
        most_numbers = TILE_NUMBERS.get(device, TILE_NUMBERS_ELSEWHERE)
        most_keys = TILE_KEYS.get(device, TILE_KEYS_ELSEWHERE)
        return list(tiles(self.q, self.k.shape[2], self.basis.num_parameters * width, most_numbers, most_keys))

    def drop(self, tile: Tile) -> Tensor | None:
        """Where the tile's pairs take no part, (heads|1, images|1, queries|1, keys|1)."""
        return None if self.mask is None else ~tile.of_pairs(self.mask)

    def sums(self, *shape: int) -> Tensor:
        """Memory for sums over tiles; the first tile of a sum overwrites it, so it's zero where there is none."""
        make = torch.zeros if 0 in (*self.q.shape[:3], self.k.shape[2]) else torch.empty
        return make(shape, dtype=self.q.dtype, device=self.q.device)


def _add(total: Tensor, part: Tensor, first: bool, factor: float = 1.0) -> None:
    """total += factor · part, or total = factor · part if this is the first; part has its first two axes as one."""
    part = part.view(total.shape) if part.is_contiguous() else part.unflatten(0, total.shape[:2])
    if first:
        torch.mul(part, factor, out=total)
    else:
        total.add_(part, alpha=factor)


def about() -> str:
    """What this is, in words."""
    return "PyTorch, tile by tile"


def forward(call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None = None) -> Tensor:
    """out (B,H,M,E) in q's precision; see `karat.basis_attention`."""
    work = _Work(call, u, basis)
    running = None if softmax is None else RunningSoftmax(softmax)
    evaluate = _linear if isinstance(basis, LinearBasis) else _nonlinear
    out = work.sums(*call.q.shape[:3], u.shape[-1])
    heads = out.transpose(0, 1)
    for tile in work.tiles():
        scores, part = evaluate(work, tile, tile.rows(work.q, tile.queries), tile.rows(work.k, tile.keys))
        if running is not None:
            running.add(tile, scores, work.drop(tile))
        _add(heads[tile.heads, tile.images, tile.queries], part, tile.keys.start == 0)
    return out.to(call.q.dtype)


def backward(
    grad: Tensor, call: Call, u: Tensor, basis: Basis, needs: Needs, softmax: SoftmaxPart | None = None
) -> Gradients:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    work, bias = _Work(call, u, basis), call.bias
    beside = None if softmax is None else SoftmaxGradients(softmax)
    step = _linear_step if isinstance(basis, LinearBasis) else _nonlinear_step
    grad = grad.transpose(0, 1).to(work.q.dtype)
    dq = work.sums(*call.q.shape) if needs[0] else None
    dk = work.sums(*call.k.shape) if needs[1] else None
    H, images, F, N, E = work.u.shape
    du = work.q.new_zeros(H, images, E, F, N) if needs[2] else None
    dbias = bias.new_zeros(bias.shape, dtype=work.q.dtype) if bias is not None and needs[3] else None
    for tile in work.tiles():
        rows, keys = tile.rows(work.q, tile.queries), tile.rows(work.k, tile.keys)
        dout = tile.rows(grad, tile.queries)
        scores, dscores, du_part = step(work, tile, rows, keys, dout, needs[2])  # (batch,m,n) twice, (batch,E,F,n)
        if beside is not None:
            dscores = beside.add(tile, scores, work.drop(tile), dscores)
        if du is not None and du_part is not None:
            parts = du_part.unflatten(0, tile.pairs)
            if images == 1 < tile.pairs[1]:
                parts = parts.sum(1, keepdim=True)
            du[tile.heads, tile.images if images > 1 else slice(None), ..., tile.keys].add_(parts)
        if dbias is not None:
            part = tile.of_pairs(dbias)
            part.add_(dscores.unflatten(0, tile.pairs).sum_to_size(part.shape))
        if dq is not None:
            part = torch.bmm(dscores, keys)
            target = dq.transpose(0, 1)[tile.heads, tile.images, tile.queries]
            _add(target, part, tile.keys.start == 0, call.scale)
        if dk is not None:
            part = torch.bmm(dscores.transpose(1, 2), rows)
            _add(dk.transpose(0, 1)[tile.heads, tile.images, tile.keys], part, tile.queries.start == 0, call.scale)
    if beside is not None:
        beside.finish()
    if du is not None:
        du = du.permute(1, 0, 3, 4, 2).to(u.dtype).contiguous().view(u.shape)
    return Gradients(
        None if dq is None else dq.to(call.q.dtype),
        None if dk is None else dk.to(call.k.dtype),
        du,
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _linear_features(work: _Work, tile: Tile, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (batch, n·m), zero where masked, and ψ (batch, F, n·m), likewise."""
    basis = work.basis
    assert isinstance(basis, LinearBasis)
    batch, m, n = len(rows), rows.shape[1], keys.shape[1]
    scores = work.buffers.take("scores", batch, n, m)
    torch.baddbmm(scores, keys, rows.transpose(1, 2), beta=0, alpha=work.scale, out=scores)
    pairs = scores.view(*tile.pairs, n, m)
    if work.bias is not None:
        pairs.add_(tile.of_pairs(work.bias).transpose(-2, -1))
    drop = work.drop(tile)
    if drop is not None:
        drop = drop.transpose(-2, -1)
        pairs.masked_fill_(drop, 0)
    psi = work.buffers.take("features", batch, basis.num_parameters, n * m)
    basis.write_features(scores.view(batch, n * m), psi)
    if drop is not None:
        psi.view(*tile.pairs, -1, n, m).masked_fill_(drop.unsqueeze(-3), 0)
    return scores.view(batch, n * m), psi


def _linear(work: _Work, tile: Tile, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """S (batch, m, n) and Σ_f ψ_f(S) U_f (batch, m, E) of one tile."""
    weights = tile.parameters(work.u).flatten(1, 2)  # (batch, F·n, E)
    scores, psi = _linear_features(work, tile, rows, keys)
    out = torch.bmm(weights.transpose(1, 2), psi.view(*weights.shape[:2], -1)).transpose(1, 2)
    return _queries_first(scores, rows), out


def _queries_first(x: Tensor, rows: Tensor) -> Tensor:
    """(batch, n·m) as (batch, m, n), not copied."""
    return x.unflatten(1, (-1, rows.shape[1])).transpose(1, 2)


def _linear_step(
    work: _Work, tile: Tile, rows: Tensor, keys: Tensor, dout: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S, dS = Σ_f ψ_f'(S) ∘ (dO U_fᵀ) and dU_f = ψ_f(S)ᵀ dO of one tile."""
    basis, weights = work.basis, tile.parameters(work.u)  # (batch, F, n, E)
    assert isinstance(basis, LinearBasis)
    F, n, m = *weights.shape[1:3], dout.shape[1]
    scores, psi = _linear_features(work, tile, rows, keys)
    dout = dout.transpose(1, 2)  # (batch, E, m)
    dweights = None
    if need_weights:
        dweights = torch.bmm(dout, psi.view(-1, F * n, m).transpose(1, 2)).unflatten(2, (F, n))
    dpsi = work.buffers.take("gradients", *psi.shape)
    torch.bmm(weights.flatten(1, 2), dout, out=dpsi.view(-1, F * n, m))
    dscores = _queries_first(basis.pull_back(scores, psi, dpsi), rows)
    if work.mask is not None:
        dscores.unflatten(0, tile.pairs).masked_fill_(work.drop(tile), 0)
    return _queries_first(scores, rows), dscores, dweights


def _scores_of_queries(work: _Work, tile: Tile, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores (batch, m, n), zero where masked, and the mask in that shape."""
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(work.scale)
    if work.bias is not None:
        scores.unflatten(0, tile.pairs).add_(tile.of_pairs(work.bias))
    if work.mask is None:
        return scores, None
    keep = tile.of_pairs(work.mask).expand(*tile.pairs, *scores.shape[1:]).flatten(0, 1)
    return scores.masked_fill_(~keep, 0), keep


def _nonlinear(work: _Work, tile: Tile, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """S (batch, m, n) and the definition (batch, m, E) on one tile."""
    scores, keep = _scores_of_queries(work, tile, rows, keys)
    weights = tile.parameters(work.u).unsqueeze(1)
    out = reference.contract(
        scores.unsqueeze(1), weights, work.basis, None if keep is None else keep.unsqueeze(1)
    ).squeeze(1)
    return scores, out


def _nonlinear_step(
    work: _Work, tile: Tile, rows: Tensor, keys: Tensor, dout: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S, dS = Σ_e ∂φ/∂s ∘ dO_e and dU = Σ_i ∂φ/∂u ∘ dO of one tile, one evaluation per edge."""
    scores, keep = _scores_of_queries(work, tile, rows, keys)
    dphi = dout.unsqueeze(-2)  # (batch, m, 1, E)
    if keep is not None:
        dphi = dphi * keep.unsqueeze(-1)
    packed = tile.parameters(work.u).transpose(0, 1).unsqueeze(2)  # (F, batch, 1, n, E)
    dx, du = work.basis.edge_gradients(scores.unsqueeze(-1), packed, dphi)
    if not need_weights:
        return scores, dx.sum(-1), None
    return scores, dx.sum(-1), torch.stack([part.expand_as(dx).sum(1).transpose(1, 2) for part in du], dim=2)


def unsupported(call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
    """Serves everything."""
    return None
