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
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from karat.basis import Basis, EdgeParameter
from karat.operator.edges import EdgeLayer, starts
from karat.operator.parameters import OperatorParameters

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
    with torch.device("cpu"), unset_fake_temporarily():  # numbers, whatever is being built and where
        return _moments(basis)


def _moments(basis: Basis) -> Moments:
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
                drawn.append(group.default_mean + size * noise if group.default_std else group.mean + group.std * noise)
    u = torch.stack(drawn).unsqueeze(1)  # (F,1,DRAWS)
    x = z.unsqueeze(-1)
    slope, parts = basis.edge_gradients(x, u, torch.ones(NODES, DRAWS, dtype=torch.float64))
    psi = torch.stack([parts[place].expand(NODES, DRAWS) * size for place, size in amplitudes])
    mean = torch.einsum("n,fnd->fd", weights, psi).abs().mean(1)
    square = torch.einsum("n,fnd->fd", weights, psi.square()).mean(1)
    power = float(square.sum())
    bend = float(torch.einsum("n,nd->d", weights, slope.square()).mean())
    return Moments(float(mean.sum()), float(square.sqrt().sum()), power, math.sqrt(bend / power))


class Gains(NamedTuple):
    """The relative change of an operator's output by a step of one on every number of each tensor."""

    layers: tuple[float, ...] = ()  # on every amplitude
    W: float = 1.0
    C: float = 1.0  # one beside sums of unit power


@torch.no_grad()
def set_factors(parameters: OperatorParameters, gains: Gains) -> None:
    """Give every learned tensor of an operator its factor; the operator stays what it is.

    Shapes (τ, s) and edge scales, whose steps change the output less than a linear layer's do, keep factors of one.
    Those that must keep their sign (denominators) have their size at the start.
    """
    for layer, gain in zip(parameters.edge_layers, gains.layers, strict=True):
        layer.set_factor(_factors(layer, gain))
    for name, gain in (("W", gains.W), ("C", gains.C)):
        if getattr(parameters, name) is not None:
            parameters.set_factor(name, rounded(RATE / gain))


def _factors(layer: EdgeLayer, gain: float) -> Tensor:
    """The factor (F,1,1) of each number of an edge; those that start larger move more."""
    found: list[float] = []
    for group in layer.basis.parameters:
        learned = group.amplitude and not (group.name == "base" and layer.has_fixed_base)
        kept = group.default_mean or 1.0
        found += [rounded(RATE * size / gain if learned else kept) for size in weights_of(group)]
    return torch.tensor(found)[:, None, None]


def layer_gain(layer: EdgeLayer) -> float:
    """The change of a layer's outputs by a step of one on every amplitude."""
    return moments(layer.basis).gain(layer.inputs)


def projector_gain(rows: int, hidden: float, keys: int) -> float:
    """The change of Σ_n V_n Σ_p W_np h_p, p over `rows`, by a step of one on W, for h of root mean square `hidden`."""
    # above one it is a fixed b(x), in step in every one of them
    return (rows * hidden if hidden > 1.0 else rows_gain(rows)) * values_gain(keys)


def hidden_size(layer: EdgeLayer, keys: int) -> float:
    """The root mean square of the R numbers before W: one, and more where a fixed b(x) is summed over the keys."""
    if not layer.has_fixed_base:
        return 1.0
    mean, power = base_moments(layer.basis)
    return math.sqrt(1 + (keys * mean) ** 2 + keys * (power - mean**2))


def base_moments(basis: Basis) -> tuple[float, float]:
    """E b and E b² of a base activation for scores of unit variance."""
    with torch.device("cpu"), unset_fake_temporarily():
        return _base_moments(basis)


def _base_moments(basis: Basis) -> tuple[float, float]:
    z = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64)
    weights = torch.exp(-0.5 * z.square())
    weights = weights / weights.sum()
    u = torch.zeros(basis.num_parameters, 1, dtype=torch.float64)
    for start, group in starts(basis):
        u[start : start + group.count] = 1.0 if group.name == "base" else group.mean
    b = basis.edge(z, u)
    return float(weights @ b), float(weights @ b.square())
