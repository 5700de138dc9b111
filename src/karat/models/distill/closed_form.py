"""An operator fitted to attention in closed form: second moments over images, then least squares (SPEC §1, §8).

The target is the row of attention y (N,) that softmax makes of a row of scores a. Errors are measured as the output
sees them: |(y - σ(a)) V|², with E[V Vᵀ] in place of each image's own.

    full rank   y ≈ Cᵀ ψ(a), the features of all keys: ordinary least squares
    W∘Φ         y ≈ W Kᵀ ψ(a): reduced-rank regression, K becomes Φ's coefficients
    Φ∘W         W from reduced-rank regression on the scores themselves, then Φ by least squares on ψ(W a)
    Φ₂∘Φ₁       Φ₁ as in W∘Φ, then Φ₂ by least squares on ψ(Φ₁(a))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from karat.basis.base import Shape
from karat.models.distill.features import features, fixed_base, write
from karat.models.distill.least_squares import Moments, least_squares, reduced_rank
from karat.operator.config import KArAtConfig
from karat.operator.edges import EdgeLayer
from karat.operator.operator import KArAtOperator

SWEEPS = 3  # over the shapes of a basis that isn't linear: each block's regression takes what the others leave


class Rows(NamedTuple):
    """Attention to imitate, of the heads that learn: scores and target (B,H',M,N), values (B,H',N,D), mask or None."""

    scores: Tensor
    target: Tensor
    values: Tensor
    mask: Tensor | None = None


Source = Callable[[], Iterator[Rows]]


def check_fits(config: KArAtConfig) -> None:
    """Raise ValueError for an operator that has no closed form here; one that begins as softmax needs none."""
    if config.begins_as_softmax:
        return
    if config.residual:
        raise ValueError(
            f"gate={config.gate} beside softmax adds an operator that starts at random, and no closed form fits it; "
            "use gate='head' or init_scale=0, which start as the softmax model"
        )
    if not config.has_edges or config.order == "Pointwise":
        fixed = "static mixing" if config.is_static else str(config)
        unserved = "order=Pointwise" if config.has_edges else fixed
        beside = "" if config.is_fixed else ", or residual=softmax, which starts as the softmax model"
        raise ValueError(f"{unserved} can't be fitted to softmax in closed form; use another attention{beside}")


@torch.no_grad()
def fit_operator(op: KArAtOperator, rows: Source, ridge: float = 1e-4) -> Tensor:
    """Give `op` the parameters that imitate the rows best; returns the share explained of each head's output (H',).

    The share is 1 - E|(y - σ) V|² / E|y V|² (V by its second moments), over the rows that were fitted.

    Args:
        op: the operator; all of its parameters but gates are replaced. A simplex projection is left out of account.
        rows: gives the rows anew each time it's called (twice for orders with two maps).
        ridge: λ of the regression as a share of the mean feature's power.

    Raises ValueError where there are no rows, and for an operator without edge functions, with one that all keys
    share, or of which no part that is linear in its parameters sees the scores themselves.
    """
    check_fits(op.config)
    if not op.edge_layers:
        raise ValueError(f"{op.config} has no edge functions to fit: name a basis, e.g. g3b")
    if op.config.order == "Pointwise":
        raise ValueError(f"{op.config}: a function that all keys share can't be fitted; use order='WPhi'")
    if op.C is not None:  # a term of the query's place takes no part in the regression
        op.C.zero_()
    if op.config.rank is None:
        return _fit_outputs(op, rows, ridge, hidden=False)
    if op.config.order == "WPhi":
        return _fit_w_phi(op, rows, ridge)
    return _fit_last(op, rows, ridge)


def _tall(x: Tensor) -> Tensor:
    """(B,M,...) -> (rows, numbers) of one head."""
    return x.reshape(-1, x[0, 0].numel())


def _dictionary(layer: EdgeLayer, x: Tensor, mask: Tensor | None, chosen: list[Shape]) -> Tensor:
    """(B,M,Q) of one head -> (rows, shapes·F·Q), masked keys zero."""
    parts = [features(layer, x, shape) for shape in chosen]  # (B,M,F,Q) each
    found = torch.stack(parts, dim=2)
    return _tall(found if mask is None else torch.where(mask[:, :, None, None], found, 0))


def _offset(layer: EdgeLayer, x: Tensor, mask: Tensor | None) -> Tensor:
    """The fixed base's sum over keys, (rows,P), of one head; b(0) = 0, so a masked key adds nothing."""
    return _tall(fixed_base(layer, x if mask is None else torch.where(mask, x, 0)))


def _mask_of(mask: Tensor | None, head: int) -> Tensor | None:
    return None if mask is None else mask[:, min(head, mask.shape[1] - 1)]


def _collect(
    op: KArAtOperator,
    rows: Source,
    inputs: Callable[[Tensor, Tensor | None], Tensor],
    *,
    offset: EdgeLayer | None = None,
    hidden: bool = False,
) -> tuple[Moments, Tensor]:
    """Moments of `inputs` against the targets, and E[V Vᵀ] (H',N,N), over all rows.

    With `hidden` the inputs see what the operator's first map makes of the scores. The targets lose the fixed base of
    the layer `offset`. A masked pair has target zero, as if the operator had to give that; where masks of pairs differ
    from row to row it need not, and distillation finds better.
    """
    moments: Moments | None = None
    heads, tokens = len(op.karat_heads), op.num_tokens
    weight = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    images = 0
    for scores, target, values, mask in rows():
        images += len(scores)
        v = values.to(torch.promote_types(values.dtype, torch.float32))
        weight += torch.einsum("bhnd,bhmd->hnm", v, v).to(weight)
        every = op.order.of_scores(op, scores, mask) if hidden else scores
        for head in range(heads):
            x, keep = every[:, head], _mask_of(mask, head)
            seen = None if hidden else keep
            z, y = inputs(x, seen), _tall(target[:, head])
            if moments is None:
                moments = Moments.zeros(heads, z.shape[-1], y.shape[-1])
            if offset is not None:
                y = y - _offset(offset, x, seen)
                y = y if keep is None else torch.where(_tall(keep), y, 0)
            moments.add(head, z, y)
    if moments is None:
        raise ValueError("there are no rows of attention to fit: give at least one image")
    return moments, weight / images


def _share(moments: Moments, fitted: Tensor, weight: Tensor) -> Tensor:
    left = (moments.error(fitted) * weight).sum((-2, -1))
    return 1 - left / (moments.power * weight).sum((-2, -1))


def _fit_outputs(op: KArAtOperator, rows: Source, ridge: float, *, hidden: bool) -> Tensor:
    """The last layer of the operator by least squares: its outputs are σ's row."""
    layer = op.edge_layers[-1]
    chosen = layer.basis.shapes()
    offset = layer if layer.has_fixed_base else None
    moments, weight = _collect(
        op, rows, lambda x, mask: _dictionary(layer, x, mask, chosen), offset=offset, hidden=hidden
    )
    return _solve_outputs(layer, chosen, moments, weight, ridge)


def _solve_outputs(layer: EdgeLayer, chosen: list[Shape], moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    """Least squares for a layer whose outputs are the targets; each output takes the shape that serves it best."""
    heads, size, outputs = moments.cross.shape
    size //= len(chosen)
    fits, errors = [], []
    for place in range(len(chosen)):
        part = slice(place * size, (place + 1) * size)
        beta = least_squares(moments.gram[:, part, part], moments.cross[:, part], ridge)
        fits.append(beta)
        gained = 2 * (beta * moments.cross[:, part]).sum(1) - (beta * (moments.gram[:, part, part] @ beta)).sum(1)
        errors.append(-gained)
    which = torch.stack(errors).argmin(0)  # (H,P)
    stacked = torch.stack(fits)  # (shapes,H,size,P)
    index = which[None, :, None].expand(1, heads, size, outputs)
    solution = stacked.gather(0, index)[0]
    write(layer, solution.unflatten(1, (-1, layer.inputs)), chosen, which)
    placed = torch.zeros_like(moments.cross)
    for place in range(len(chosen)):
        placed[:, place * size : (place + 1) * size] = torch.where((which == place)[:, None], solution, 0)
    return _share(moments, placed, weight)


def _low_rank(
    moments: Moments, weight: Tensor, rank: int, blocks: int, ridge: float
) -> tuple[Tensor, Tensor, list[int]]:
    """y ≈ W Kᵀ z with column p of K zero outside of block p mod `blocks`: K (H,P,R), W (H,N,R), each column's block."""
    size = moments.gram.shape[-1] // blocks
    block_of = [p % blocks for p in range(rank)]
    K = moments.gram.new_zeros(*moments.cross.shape[:2], rank)
    W = moments.gram.new_zeros(moments.cross.shape[0], moments.cross.shape[2], rank)
    for _ in range(1 if blocks == 1 else SWEEPS):
        for block in range(blocks):
            columns = [p for p in range(rank) if block_of[p] == block]
            if not columns:
                continue
            W[:, :, columns] = 0
            part = slice(block * size, (block + 1) * size)
            cross = moments.without(K @ W.mT)[:, part]
            found = reduced_rank(moments.gram[:, part, part], cross, len(columns), weight=weight, ridge=ridge)
            K[:, part, columns], W[:, :, columns] = found
    return K, W, block_of


def _balanced(moments: Moments, K: Tensor, W: Tensor, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same W Kᵀ with every Kᵀ z of root mean square `size`."""
    power = (K * (moments.gram @ K)).sum(1) / max(moments.rows, 1)
    scale = torch.where(power > 0, size * power.clamp(min=1e-30).rsqrt(), 0.0)[:, None]
    return K * scale, torch.where(scale > 0, W / scale.clamp(min=1e-30), W)


def _first_map(
    op: KArAtOperator, rows: Source, ridge: float, size: float = 1.0
) -> tuple[Moments, Tensor, Tensor, Tensor]:
    """Reduced-rank regression of the targets on Φ's features, written into the first layer; moments, weight, K, W."""
    layer, rank = op.edge_layers[0], op.config.rank or 0
    chosen = layer.basis.shapes()

    def inputs(x: Tensor, mask: Tensor | None) -> Tensor:
        z = _dictionary(layer, x, mask, chosen)
        # one column for all: the R outputs are no tokens, so their gains are the same
        return torch.cat([z, _offset(layer, x, mask)[:, :1]], dim=-1) if layer.has_fixed_base else z

    moments, weight = _collect(op, rows, inputs)
    if layer.has_fixed_base:
        K, W, which = _beside_fixed_base(moments, weight, rank, len(chosen), ridge, size)
        K_written = K[:, :-1]
    else:
        K, W, which = _low_rank(moments, weight, rank, len(chosen), ridge)
        K, W = _balanced(moments, K, W, size)
        K_written = K
    per_shape = K_written.unflatten(1, (len(chosen), -1, layer.inputs))  # (H,shapes,F,Q,R)
    solution = torch.stack([per_shape[:, which[p], :, :, p] for p in range(rank)], dim=-1)
    write(layer, solution, chosen, torch.tensor(which).expand(len(solution), -1))
    return moments, weight, K, W


def _beside_fixed_base(
    moments: Moments, weight: Tensor, rank: int, blocks: int, ridge: float, size: float
) -> tuple[Tensor, Tensor, list[int]]:
    """The last feature, b's sum, reaches every one of the R numbers with factor one, so σ gets it times W 1.

    It's regressed out, the others take rank R - 1, and the last column of W makes W 1 what the sum is to have.
    """
    base, rest = slice(-1, None), moments.beside_last()
    K, W, which = _low_rank(rest, weight, rank - 1, blocks, ridge)
    K, W = _balanced(rest, K, W, size)
    wanted = (moments.cross[:, base] - moments.gram[:, base, :-1] @ K @ W.mT) / moments.gram[:, base, base]  # (H,1,N)
    W = torch.cat([W, wanted.mT - W.sum(-1, keepdim=True)], dim=-1)
    K = torch.nn.functional.pad(K, (0, 1))
    ones = torch.ones_like(K[:, :1])
    return torch.cat([K, ones], dim=1), W, [*which, 0]


def _fit_w_phi(op: KArAtOperator, rows: Source, ridge: float) -> Tensor:
    moments, weight, K, W = _first_map(op, rows, ridge)
    op.write("W", W)
    return _share(moments, K @ W.mT, weight)


def _fit_last(op: KArAtOperator, rows: Source, ridge: float) -> Tensor:
    """Orders Φ∘W and Φ₂∘Φ₁: the first map to R numbers, then the last layer by least squares on what they are."""
    # the R numbers fill the last layer's reach: they lie within it at three standard deviations
    size = op.edge_layers[-1].basis.reach / 3
    if op.W is None:
        _first_map(op, rows, ridge, size)
    else:
        op.write("W", _projection(op, rows, ridge, size))
    return _fit_outputs(op, rows, ridge, hidden=True)


def _projection(op: KArAtOperator, rows: Source, ridge: float, size: float) -> Tensor:
    """W (H,R,N) of order Φ∘W: reduced-rank regression on the scores, the targets' means aside."""

    def inputs(x: Tensor, mask: Tensor | None) -> Tensor:
        kept = _tall(x if mask is None else torch.where(mask, x, 0))
        return torch.cat([kept, torch.ones_like(kept[:, :1])], dim=-1)

    moments, weight = _collect(op, rows, inputs)
    centred = moments.beside_last()
    K, W = reduced_rank(centred.gram, centred.cross, op.config.rank or 0, weight=weight, ridge=ridge)
    whole = Moments(moments.gram[:, :-1, :-1], moments.cross[:, :-1], moments.power, moments.rows)
    return _balanced(whole, K, W, size)[0].mT
