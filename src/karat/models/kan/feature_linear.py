"""The one heavy operation of KAN layers whose edges are linear in their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from karat.basis import LinearBasis
from karat.models.kan.plain import plain_formulas

# Values of ψ that exist at a time: on a CPU they should stay near the cache, a GPU wants large products.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 25
_LEAST_ROWS = 64


def feature_linear(x: Tensor, weight: Tensor, basis: LinearBasis) -> Tensor:
    """Σ_q φ_qp(x_q), the edges φ_qp = Σ_f weight[f,q,p] ψ_f: x (...,Q), weight (F,Q,P) -> (...,P).

    A product of the features ψ(x) (T, F·Q) and the weights (F·Q, P), T being all leading axes. The features are
    F times as large as x, so they are written for a block of rows at a time and computed again in the backward
    pass; only x is kept. Under torch.compile and export, and within `karat.models.kan.plain.plain`, the plain formula
    stands in its place.

    Under autocast the features are computed in float32 and the product in autocast's precision.

    Raises ValueError if the weight's shape doesn't fit x and the basis.
    """
    F, Q, P = weight.shape
    if x.shape[-1] != Q or basis.num_parameters != F:
        raise ValueError(
            f"weight {tuple(weight.shape)} doesn't fit {x.shape[-1]} inputs and the {basis.num_parameters} functions "
            f"of {basis}; it must be (F, Q, P)"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
        x = x.float()
    rows = x.reshape(-1, Q)
    if plain_formulas(x, weight):
        psi = basis.features(rows).flatten(1).to(weight.dtype)
        return (psi @ weight.reshape(F * Q, P)).reshape(*x.shape[:-1], P)
    out: Tensor = _FeatureLinear.apply(rows, weight, basis)
    return out.reshape(*x.shape[:-1], P)


class _FeatureLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, basis: LinearBasis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.basis = basis
        matrix = weight.reshape(-1, weight.shape[-1])
        out = weight.new_empty(len(x), matrix.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for rows, psi in _blocks(x, len(weight)):
                basis.write_features(x[rows], psi)
                torch.mm(psi.flatten(1).to(weight.dtype), matrix, out=out[rows])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.reshape(-1, weight.shape[-1])
        # Blocks of a half-precision gradient are added up in float32.
        total = torch.zeros_like(matrix, dtype=torch.promote_types(weight.dtype, torch.float32))
        dx = torch.empty_like(x) if wants_x else None
        with torch.autocast(x.device.type, enabled=False):
            for rows, psi in _blocks(x, len(weight)):
                ctx.basis.write_features(x[rows], psi)
                if wants_weight:
                    flat = psi.flatten(1).to(weight.dtype)
                    if total.dtype == weight.dtype:
                        total.addmm_(flat.t(), grad[rows])
                    else:
                        total.add_(flat.t() @ grad[rows])
                if dx is not None:
                    dpsi = (grad[rows] @ matrix.t()).to(x.dtype).view_as(psi)
                    dx[rows] = ctx.basis.pull_back(x[rows], psi, dpsi)
        return dx, total.to(weight.dtype).view_as(weight) if wants_weight else None, None


def _blocks(x: Tensor, functions: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of x's rows, each with room (rows, F, Q) for its features; the room is used again and again."""
    values = functions * x.shape[1]
    size = max(_LEAST_ROWS, _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // values)
    room = x.new_empty(min(size, len(x)), functions, x.shape[1])
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, room[: rows.stop - rows.start]
