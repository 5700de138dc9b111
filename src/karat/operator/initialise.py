"""How an operator starts.

"paper": the draws of SPEC §2, W as a linear layer's. "default": random draws scaled so that, for scores of unit
variance, O = σ(A) V starts as large as under softmax of equal scores, E Σ_n σ_kn² = 1/N, and beside softmax with the
variance of V's entries, E Σ_n σ_kn² = 1: exactly in expectation over the scores for the numbers drawn, as the moments
of every edge function are integrated, not estimated. A start at V's variance in place of softmax drowns each token in
the others' noise, and fails at rates that softmax bears (docs/training-stability.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.operator.config import KArAtConfig
from karat.operator.edges import EdgeLayer
from karat.operator.fixed import Fixed
from karat.operator.order import Order
from karat.operator.parameters import OperatorParameters
from karat.operator.rates import set_factors


@torch.no_grad()
def initialise(parameters: OperatorParameters, order: Order, config: KArAtConfig) -> None:
    """Draw all of an operator's parameters by its configuration. Does nothing on the meta device."""
    if any(parameter.is_meta for parameter in parameters.parameters()):
        return
    if parameters.sharpness is not None:
        nn.init.ones_(parameters.sharpness)
    if isinstance(order, Fixed):
        return
    if parameters.gate is not None:
        nn.init.zeros_(parameters.gate)
    for name, buffer in parameters.named_buffers():
        if name.endswith(("factor", "base_gain")):
            buffer.fill_(1.0)
    for layer in parameters.edge_layers:
        _draw(layer, config.init)
    if parameters.C is not None:
        nn.init.normal_(parameters.C) if order.places_take_part(config.init) else nn.init.zeros_(parameters.C)
    if config.init == "paper":
        if parameters.W is not None:
            bound = parameters.W.shape[-1] ** -0.5
            nn.init.uniform_(parameters.W, -bound, bound)
    else:
        if parameters.W is not None:
            for head in parameters.W:
                _semi_orthogonal(head)
        order.balance(parameters)
    size, share = _size(parameters, config), config.init_scale
    if size * share != 1.0:
        order.scale(parameters, torch.full((parameters.heads,), size * share))
    if config.init == "default":
        set_factors(parameters, order.gains(parameters, size * (share or 1.0)))


def _size(parameters: OperatorParameters, config: KArAtConfig) -> float:
    """The size of O at the start as a share of V's.

    In place of softmax it's that of softmax over equal scores, 1/√N; beside it one: a gate says how much is taken.
    """
    # b(x) in what multiplies the values keeps its size
    fixed = parameters.layout.edges_last and parameters.edge_layers[-1].has_fixed_base
    in_its_place = config.init == "default" and config.residual is None and not fixed
    return float(parameters.num_tokens**-0.5) if in_its_place else 1.0


def _draw(layer: EdgeLayer, init: str) -> None:
    for group in layer.basis.parameters:
        if group.name == "base":
            continue
        parameter = getattr(layer, group.name)
        nn.init.normal_(parameter, group.mean, group.std)
        if init == "default" and group.default_std is not None:
            parameter.mul_(parameter.new_tensor(group.default_std)[:, None, None]).add_(group.default_mean)
    if layer.basis_scale is not None:
        nn.init.ones_(layer.basis_scale)
    if layer.base_scale is not None:
        nn.init.ones_(layer.base_scale)
        if init == "default" and layer.has_base:  # one more random coefficient
            nn.init.normal_(layer.base_scale)


def _semi_orthogonal(matrix: Tensor) -> None:
    """Unit rows and, where there are no more of them than columns, orthogonal; else orthogonal columns."""
    drawn = nn.init.orthogonal_(matrix.float() if matrix.element_size() < 4 else matrix)  # QR knows no half precision
    if matrix.shape[0] <= matrix.shape[1]:
        drawn.div_(drawn.norm(dim=1, keepdim=True).clamp(min=1e-12))
    if drawn is not matrix:
        matrix.copy_(drawn)
