"""Rates: the factors that let every learned tensor of an operator change its output as fast as a linear layer does.

Adam moves each number by the learning rate, whatever its size, and the numbers of an operator add up: over N keys, over
R rows, over F features. A tensor T of the operator is therefore `factor · parameter`. The factor is chosen so that one
step of size η on the parameter changes the operator's output by about `RATE`·η of its size, at any N, R and G: the idea
is µP's, rates by fan-in (Yang & Hu 2021, arXiv 2203.03466). `gain` below is the change for a factor of one.

Two kinds of sum occur, each partly in step (growing as its length) and partly not (as its root); their constants
were fitted once to measured changes (benchmarks/rates.py), and docs/method.md derives their form:

- over inputs of edges: `Moments.gain(n)`; over rows of W: `rows_gain(R)`; over scores: `scores_gain(N)`;
- over values, where the tensor has one number for each key of V: `values_gain(N)`.

The factors are stored with the weights (buffers `factor`, `W_factor`, `C_factor`). What was saved without them was
trained with factors of one, and is loaded so.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis, EdgeParameter
from karat.operator.edges import EdgeLayer, starts

if TYPE_CHECKING:
    from karat.operator.operator import KArAtOperator

# Of each tensor, per unit of the rate: a linear layer of width 192 has 28 on white inputs, and two tensors add up.
RATE = 20.0
NODES, REACH = 129, 6.0
DRAWS = 64  # of shapes (τ, s, denominators) over which the moments of a basis are averaged


class Moments(NamedTuple):
    """What the features ψ_f of a basis are for scores of unit variance, each times its number's size w_f at the start.

    mean: Σ w|E ψ|; size: Σ w √E ψ²; power: Σ w² E ψ²; slope: root of Σ w² E ψ'² over power.
    """

    mean: float
    size: float
    power: float
    slope: float

    def gain(self, inputs: int) -> float:
        """The change of y = Σ_q Σ_f c_fq ψ_f(x_q) by a step of one on every c."""
        n = inputs
        return math.sqrt(0.41 * (n * self.mean) ** 2 + n * (0.3 * self.size**2 + self.power))


def rows_gain(rows: int) -> float:
    """The relative change of Σ_p W_np h_p, h of unit power, by a step of one on W, for one n."""
    return math.sqrt(rows * (1 + rows / 12))


def scores_gain(keys: int) -> float:
    """The same of Σ_n W_rn A_n over scores of unit variance."""
    return math.sqrt(keys * (1 + keys / 18))


def values_gain(keys: int) -> float:
    """The change of Σ_n σ_n V_n by a step of one on every σ_n, V of unit variance."""
    return math.sqrt(keys * (1 + keys / 100))


def rounded(value: float) -> float:
    """The nearest number of eight binary digits: the same in every precision, so that no cast changes a function."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


def weights_of(group: EdgeParameter) -> tuple[float, ...]:
    """The size at the start of each number of a group, up to a common factor."""
    return group.default_std or (1.0,) * group.count


@lru_cache(maxsize=64)
def moments(basis: Basis) -> Moments:
    """The moments of a basis's amplitudes, by quadrature over the scores; shapes as they are drawn at the start."""
    generator = torch.Generator().manual_seed(0)
    z = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64)
    weights = torch.exp(-0.5 * z.square())
    weights = weights / weights.sum()
    drawn: list[Tensor] = []
    amplitudes: list[tuple[int, float]] = []
    for group in basis.parameters:
        for size in weights_of(group):
            noise = torch.randn(DRAWS, dtype=torch.float64, generator=generator)
            if group.amplitude:
                amplitudes.append((len(drawn), size))
                drawn.append(noise * size)
            else:
                own = size if group.default_std else group.std
                drawn.append(group.mean + own * noise)
    u = torch.stack(drawn).unsqueeze(1)  # (F,1,DRAWS)
    x = z.unsqueeze(-1)
    slope, parts = basis.edge_gradients(x, u, torch.ones(NODES, DRAWS, dtype=torch.float64))
    psi = torch.stack([parts[place].expand(NODES, DRAWS) * size for place, size in amplitudes])
    mean = torch.einsum("n,fnd->fd", weights, psi).abs().mean(1)
    square = torch.einsum("n,fnd->fd", weights, psi.square()).mean(1)
    power = float(square.sum())
    bend = float(torch.einsum("n,nd->d", weights, slope.square()).mean())
    return Moments(float(mean.sum()), float(square.sqrt().sum()), power, math.sqrt(bend / power))


@torch.no_grad()
def set_factors(op: KArAtOperator, size: float) -> None:
    """Give every learned tensor of an operator its factor; the operator stays what it is.

    size: that of its output at the start, as a share of V's. Shapes (τ, s, denominators) and edge scales, whose steps
    change the output less than a linear layer's do, keep factors of one.
    """
    for place, (layer, shape) in enumerate(zip(op.edge_layers, op.order.layer_shapes, strict=True)):
        layer.set_factor(_factors(layer, _layer_gain(op, place, shape, size)))
    if op.W is not None:
        op.set_factor("W", rounded(RATE / _projector_gain(op, size)))
    if op.C is not None:
        own = values_gain(op.num_tokens) / size if op.position_shape == "NN" else 1.0  # beside sums of unit power
        op.set_factor("C", rounded(RATE / own))


def _factors(layer: EdgeLayer, gain: float) -> Tensor:
    """The factor (F,1,1) of each number of an edge; those that start larger move more."""
    found: list[float] = []
    for group in layer.basis.parameters:
        learned = group.amplitude and not (group.name == "base" and layer.has_fixed_base)
        found += [rounded(RATE * size / gain) if learned else 1.0 for size in weights_of(group)]
    return torch.tensor(found)[:, None, None]


def _layer_gain(op: KArAtOperator, place: int, shape: str, size: float) -> float:
    """The relative change of the operator's output by a step of one on every amplitude of a layer."""
    layer, N = op.edge_layers[place], op.num_tokens
    basis = moments(layer.basis)
    if shape == "A1":  # one function for all pairs: its numbers have one sign each for all keys
        return math.sqrt(N * basis.power) / size
    gain = basis.gain(layer.inputs)
    if shape[1] == "N":  # the outputs multiply values
        return gain * values_gain(N) / size
    if place + 1 < len(op.edge_layers):  # they are what the next layer's functions see
        return gain * moments(op.edge_layers[place + 1].basis).slope
    return gain / _hidden_size(op)


def _projector_gain(op: KArAtOperator, size: float) -> float:
    """The same for W."""
    N, R = op.num_tokens, op.config.rank or 1
    if op.order.projector_shape == "RN":
        return scores_gain(N) * moments(op.edge_layers[-1].basis).slope
    hidden = _hidden_size(op)
    if op.config.simplex == "rank":  # R numbers that sum to one
        rows = 1.0
    elif hidden > 1.0:  # a fixed b(x) in every one of them
        rows = R * hidden
    else:
        rows = rows_gain(R) if op.order.projector_shape == "NR" else 1.0
    return rows * values_gain(N) / size


def _hidden_size(op: KArAtOperator) -> float:
    """The root mean square of the R numbers before W: one, and more where a fixed b(x) is summed over the keys."""
    if not op.edge_layers or not op.edge_layers[0].has_fixed_base:
        return 1.0
    mean, power = base_moments(op.edge_layers[0].basis)
    N = op.num_tokens
    return math.sqrt(1 + (N * mean) ** 2 + N * (power - mean**2))


def base_moments(basis: Basis) -> tuple[float, float]:
    """E b and E b² of a base activation for scores of unit variance."""
    z = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64)
    weights = torch.exp(-0.5 * z.square())
    weights = weights / weights.sum()
    u = torch.zeros(basis.num_parameters, 1, dtype=torch.float64)
    for start, group in starts(basis):
        u[start : start + group.count] = 1.0 if group.name == "base" else group.mean
    b = basis.edge(z, u)
    return float(weights @ b), float(weights @ b.square())
