"""What an edge layer is linear in: its features at given scores, and its parameters written from a solution.

A basis that is linear in its parameters gives its own features. Of the others the amplitudes (a wavelet's weight, a
rational's numerator) enter linearly once the shapes (τ, s, denominator) are chosen: each of a few shapes gives features
of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import LinearBasis
from karat.basis.base import Shape
from karat.operator.edges import EdgeLayer, starts


def free_amplitudes(layer: EdgeLayer) -> list[int]:
    """Places, in packing order, of the numbers of an edge that the solution is about."""
    places: list[int] = []
    start = 0
    for group in layer.basis.parameters:
        if group.amplitude and not (group.name == "base" and layer.has_fixed_base):
            places += range(start, start + group.count)
        start += group.count
    return places


def features(layer: EdgeLayer, x: Tensor, shape: Shape) -> Tensor:
    """x (...,Q) -> (...,F,Q): what multiplies each free amplitude, F of them."""
    places = free_amplitudes(layer)
    if isinstance(layer.basis, LinearBasis):
        found = layer.basis.features(x)[..., places, :]
    else:
        unit = torch.zeros(layer.basis.num_parameters, dtype=x.dtype, device=x.device)
        start = 0
        for group in layer.basis.parameters:
            if group.name in shape:
                unit[start : start + group.count] = torch.tensor(shape[group.name]).to(unit)
            start += group.count
        parts = []
        for place in places:
            u = unit.clone()
            u[place] = 1
            parts.append(layer.basis.edge(x, u.reshape(-1, *(1,) * x.dim())))
        found = torch.stack(parts, dim=-2)
    gain = layer.basis.key_gain(layer.inputs)
    return found if gain is None else found * gain.to(found)


def fixed_base(layer: EdgeLayer, x: Tensor) -> Tensor:
    """Σ_q b(x_q) g_qp, (...,Q) -> (...,P), g the fixed factors: what each output gets whatever is learned.

    g is 1 at first; on a resampled token grid it depends on the output too, where outputs are tokens (SPEC §9).
    """
    u = torch.zeros(layer.basis.num_parameters, dtype=x.dtype, device=x.device)
    for start, group in starts(layer.basis):
        if group.name == "base":
            u[start] = 1
        elif not group.amplitude:
            u[start : start + group.count] = group.mean
    return layer.basis.edge(x, u.reshape(-1, *(1,) * x.dim())) @ layer.base_gain.to(x)


@torch.no_grad()
def write(layer: EdgeLayer, solution: Tensor, chosen: list[Shape], which: Tensor) -> None:
    """Give a layer its amplitudes, solution (H,F,Q,P), and to output p of head h the shape chosen[which[h,p]]."""
    factor = layer.factor.clone()
    layer.factor.fill_(1.0)
    start = 0
    for group in layer.basis.parameters:
        if group.name == "base":
            if layer.base_scale is not None:
                layer.base_scale.copy_(solution[:, 0])
                start += 1
            continue
        parameter = getattr(layer, group.name)
        if group.amplitude:
            parameter.copy_(solution[:, start : start + group.count])
            start += group.count
        else:
            table = torch.tensor([shape[group.name] for shape in chosen])  # (shapes,count)
            parameter.copy_(table[which].mT.unsqueeze(2).expand_as(parameter))
    if layer.basis_scale is not None:
        layer.basis_scale.fill_(1.0)
    layer.set_factor(factor)
