"""Random directions in weight space whose lengths fit the weights, filter by filter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.analyze.trajectory import Direction
from karat.models.kan import FourierLinear, RBFLinear, SplineLinear
from karat.operator.edges import EdgeLayer
from karat.operator.operator import KArAtOperator


def filter_axes(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Which axes of each trainable parameter count its filters; None for those that don't move.

    A filter is what feeds one number of a layer's output:
    - linear layers and convolutions: one row, one output channel (Li et al. 2018, §4);
    - KAN coefficients (H,count,Q,P), of every group, and edge scales (H,Q,P): all numbers of one head and output p,
      for σ's p-th hidden value is the sum of the edges φ_p1 ... φ_pQ and not of one edge alone;
    - W (H,N,R) or (H,R,N): one row of one head;
    - KAN layers of the MLP, coefficients (F,Q,P): all numbers of one output p;
    - embeddings: one token.
    Biases, norms, gates and other vectors don't move, as in the authors' code: scaling them has no invariance to
    take out, and they hold few numbers.
    """
    axes: dict[str, tuple[int, ...] | None] = {}
    rules: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, EdgeLayer):
            rules |= {id(p): (0, p.dim() - 1) for p in module.parameters(recurse=False)}
        elif isinstance(module, KArAtOperator) and module.W is not None:
            rules[id(module.W)] = (0, 1)
        elif isinstance(module, SplineLinear | FourierLinear | RBFLinear):
            rules[id(module.coefficients)] = (2,)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            rules[id(module.weight)] = (0,)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rest = tuple(range(parameter.dim() - 1)) if parameter.dim() > 1 else None
            axes[name] = rules.get(id(parameter), rest)
    return axes


def random_directions(model: nn.Module, *, seed: int = 0) -> tuple[Direction, Direction]:
    """Two normal random directions, each filter scaled to the length of the model's own (Li et al. 2018).

    See `filter_axes` for what a filter is. Parameters that don't move are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = filter_axes(model)
    parameters = dict(model.named_parameters())
    first, second = (
        {name: _drawn(parameters[name].detach(), kept, generator) for name, kept in axes.items()} for _ in range(2)
    )
    return first, second


def _drawn(weight: Tensor, kept: tuple[int, ...] | None, generator: torch.Generator) -> Tensor:
    if kept is None:
        return torch.zeros_like(weight)
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    summed = tuple(axis for axis in range(weight.dim()) if axis not in kept)
    lengths = torch.linalg.vector_norm(noise, dim=summed, keepdim=True)
    return noise * torch.linalg.vector_norm(weight, dim=summed, keepdim=True) / lengths.clamp_min(1e-12)
