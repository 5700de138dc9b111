"""What the edges learned: curves φ_pq, distributions of coefficients and of W, the formulas nearest to them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat.analyze.attention import BlockAttention, check_head, choose_block
from karat.analyze.symbolic import Formula, fit_formula
from karat.analyze.weights import check_finite, widened
from karat.models.record import recorded
from karat.operator.edges import EdgeLayer
from karat.operator.operator import KArAtOperator, karat_operators

# Values of edges evaluated at a time: 2^24 numbers are 64 MiB in float32.
CHUNK_NUMBERS = 1 << 24
NAMED_EDGES, DRAWN_EDGES, CURVE_POINTS = 3, 40, 201


@dataclass(frozen=True)
class Curves:
    """Some edge functions of one head: x (X,), values (E,X), and each one's output p and input q, (E,) each."""

    x: Tensor
    values: Tensor
    outputs: Tensor
    inputs: Tensor

    def joined(self, other: Curves) -> Curves:
        """These functions, then those of another selection on the same x."""
        mine, others = ((c.values, c.outputs, c.inputs) for c in (self, other))
        return Curves(self.x, *(torch.cat(pair) for pair in zip(mine, others, strict=True)))


def operators_of(model: nn.Module) -> dict[str, KArAtOperator]:
    """The model's learnable operators by module name, a universal one once.

    Raises ValueError for a model without any.
    """
    found = karat_operators(model)
    if not found:
        raise ValueError("this model has no learnable attention: edge functions need a KArAt run, such as g3b")
    return found


def operator_of_block(model: nn.Module, block: int) -> KArAtOperator | None:
    """The operator that serves a block, shared or its own; None where the block keeps softmax.

    Raises ValueError for a block that isn't there.
    """
    return choose_block(recorded(model), block)[1]


def instead_of_edges(model: nn.Module, block: int, op: KArAtOperator | None) -> str:
    """What a block, or a head of it, without edge functions does, in words; `op` is the operator that serves it."""
    if op is None:
        return f"keeps {choose_block(recorded(model), block)[0].kind.stays or 'softmax'}"
    return "mixes tokens by a learned matrix" if op.config.is_static else f"keeps {op.config}"


def learned_head(op: KArAtOperator, head: int) -> int:
    """The place of a head of the model among those that learn. Raises ValueError for one that keeps softmax."""
    check_head(head, op.num_heads)
    if head not in op.karat_heads:
        learning = ", ".join(map(str, op.karat_heads))
        raise ValueError(f"head {head} keeps softmax and has no edge functions; those that learn are {learning}")
    return op.karat_heads.index(head)


@torch.no_grad()
def curves(
    op: KArAtOperator, head: int, x: Tensor, *, layer: int = 0, edges: int | None = None, spread: bool = True
) -> Curves:
    """Edge functions φ_pq of one head on the points x (X,), by `op.edges`.

    Args:
        edges: how many; None means all P·Q.
        spread: the chosen ones are spread evenly over the layer; False takes the ones of largest amplitude
            (mean square on x).

    Raises ValueError for a head that isn't there or keeps softmax, or a layer that isn't there.
    """
    place = learned_head(op, head)
    edges_of = _layer(op, layer)
    P, Q = edges_of.outputs, edges_of.inputs
    rows = max(1, CHUNK_NUMBERS // (len(op.karat_heads) * P * Q))
    count = P * Q if edges is None else min(edges, P * Q)
    if count < 1:
        raise ValueError(f"edges must be >= 1, got {edges}")
    if spread:
        # By a step without a factor in common with P·Q, about a golden section: no edge comes twice, and no input or
        # output again and again.
        step = next(s for s in itertools.count(round(0.618 * P * Q)) if math.gcd(s, P * Q) == 1)
        chosen = torch.arange(count) * step % (P * Q) if count < P * Q else torch.arange(count)
    else:
        energy = sum(op.edges(part, layer)[..., place, :, :].square().sum(0) for part in x.split(rows))
        assert isinstance(energy, Tensor)
        chosen = energy.flatten().topk(count).indices
    parts = [op.edges(part, layer)[..., place, :, :].flatten(-2)[:, chosen] for part in x.split(rows)]
    return Curves(x, torch.cat(parts).T.contiguous(), chosen // Q, chosen % Q)


@torch.no_grad()
def arguments_of(op: KArAtOperator, block: BlockAttention) -> Tensor:
    """What a block's edge functions act on, (B,H',M,Q) of the heads that learn: its scores, but for order PhiW."""
    return op.arguments(block.scores, block.mask)


def drawn_curves(op: KArAtOperator, head: int, arguments: Tensor) -> tuple[Curves, list[Formula]]:
    """What is drawn of a head over the stretch where `arguments` lie: its strongest edges, first, with the nearest
    formula of each, and more that are spread over the layer."""
    x = torch.linspace(*score_range(arguments), CURVE_POINTS)
    strong = curves(op, head, x, edges=NAMED_EDGES, spread=False)
    formulas = [fit_formula(x.numpy(), values.numpy()) for values in strong.values]
    return strong.joined(curves(op, head, x, edges=DRAWN_EDGES)), formulas


@dataclass(frozen=True)
class Distribution:
    """How numbers of one kind are spread in one head: mean, deviation, a histogram."""

    name: str
    head: int
    mean: float
    std: float
    counts: Tensor  # (bins,)
    bin_edges: Tensor  # (bins + 1,)


def coefficients(op: KArAtOperator, *, bins: int = 50) -> list[Distribution]:
    """Distributions of every learned group of numbers (coefficients, scales, W, C), per head that learns.

    Groups of layer Φ₂ in order PhiPhi are named "2/..."; the heads of one group share their bins.
    """
    groups: dict[str, Tensor] = {}
    for index, layer in enumerate(op.edge_layers):
        prefix = f"{index + 1}/" if len(op.layers) > 1 else ""
        groups |= {f"{prefix}{name}": value for name, value in layer.values().items()}
    groups |= {name: getattr(op, name) * getattr(op, f"{name}_factor") for name in op.layout.maps}
    found = []
    for name, parameter in groups.items():
        values = parameter.detach().float().cpu()
        check_finite(f"the operator's {name}", values)
        low, high = widened(float(values.min()), float(values.max()))
        bin_edges = torch.linspace(low, high, bins + 1)
        for place, head in enumerate(op.karat_heads):
            mine = values[place].flatten()
            mean, std = float(mine.mean()), float(mine.std(unbiased=False))
            found.append(Distribution(name, head, mean, std, torch.histc(mine, bins, low, high), bin_edges))
    return found


def score_range(scores: Tensor) -> tuple[float, float]:
    """Where the scores of a block lie, mean ± three standard deviations: the stretch worth plotting."""
    mean, std = float(scores.mean()), float(scores.std())
    reach = max(3 * std, 1e-3)
    return mean - reach, mean + reach


def _layer(op: KArAtOperator, layer: int) -> EdgeLayer:
    if not op.layers:
        raise ValueError("static mixing is blind to the scores: it has no edge functions")
    layers = op.edge_layers
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must be 0 to {len(layers) - 1} in order {op.config.order}, got {layer}")
    return layers[layer]
