"""Operators carried to another token grid: another image size, another window, other prefix tokens (SPEC §9).

What an operator learned is indexed by token position, so it's a function on the token grid and is interpolated as
position embeddings are. Amplitudes are scaled by cells_old/cells_new along every token axis, so that sums over keys
keep their size; shapes (τ, s, denominators) are interpolated as they are. Of a product s_f·c one factor, c, is scaled.

Prefix tokens (class, registers) keep their own values, unscaled. Dropping keeps the first ones. An added one starts
as an absent term: amplitudes 0, so that it neither adds to the operator's sums nor receives weight in σ, and shapes
of the grid's mean; it learns from there.

The axis of queries of a term of their position, and of a static matrix, is interpolated unscaled: it isn't summed over.
A function that all keys share (order Pointwise) has no such axis; its amplitude is scaled as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.operator.edges import EdgeLayer, starts
from karat.operator.layout import Axes
from karat.operator.operator import KArAtOperator


class TokenGrid(NamedTuple):
    """Prefix tokens, then cells of a grid, row by row."""

    prefix: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        """How many tokens are cells."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.prefix + self.cells


def token_grid(grid: int | Sequence[int], prefix: int) -> TokenGrid:
    """A TokenGrid from (height, width), or from a length for 1-D sequences; ValueError for others."""
    some = tuple(grid) if isinstance(grid, Iterable) else (grid,)
    sizes = (1,) * (2 - len(some)) + some
    if len(sizes) != 2 or any(not isinstance(size, Integral) or size < 1 for size in sizes):
        raise ValueError(
            f"a token grid is a length or (height, width), whole numbers of at least 1, got {grid!r}; a quotient of "
            "sizes is one by //"
        )
    if prefix < 0:
        raise ValueError(f"the number of prefix tokens must be >= 0, got {prefix}")
    return TokenGrid(prefix, *sizes)


def resample_axis(x: Tensor, dim: int, old: TokenGrid, new: TokenGrid, *, amplitude: bool) -> Tensor:
    """`x` with its token axis `dim` carried from one grid to another; the module's docstring has the rules.

    Bicubic, antialiased when shrinking, at least in float32.
    """
    prefix, cells = x.movedim(dim, -1).split([old.prefix, old.cells], dim=-1)
    if (old.height, old.width) != (new.height, new.width):
        cells = _interpolate(cells, old, new)
        if amplitude:
            cells = cells * (old.cells / new.cells)
    added = new.prefix - old.prefix
    prefix = prefix[..., : new.prefix]
    if added > 0:
        start = torch.zeros_like(cells[..., :1]) if amplitude else cells.mean(-1, keepdim=True)
        prefix = torch.cat([prefix, start.expand(*start.shape[:-1], added)], dim=-1)
    return torch.cat([prefix, cells], dim=-1).movedim(-1, dim).contiguous()


def _interpolate(cells: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
    image = cells.reshape(-1, 1, old.height, old.width)
    shrinks = new.height < old.height or new.width < old.width
    image = F.interpolate(
        image.to(torch.promote_types(image.dtype, torch.float32)),
        size=(new.height, new.width),
        mode="bicubic",
        antialias=shrinks,
    )
    return image.reshape(*cells.shape[:-1], new.cells).to(cells.dtype)


@torch.no_grad()
def resample_operator(
    op: KArAtOperator,
    old_grid: int | Sequence[int],
    new_grid: int | Sequence[int],
    old_prefix: int = 0,
    new_prefix: int | None = None,
) -> KArAtOperator:
    """Carry one operator to another token grid, in place (SPEC §9).

    Token axes are, by order: WPhi Φ's keys and W's N; full rank Φ's keys and outputs; PhiW W's N and Φ's outputs;
    PhiPhi Φ₁'s keys and Φ₂'s outputs; static mixing, alone or in order Pointwise, and a row W's N; and of C, where
    there is one, its queries. The same grid and prefix leave the operator untouched, bit for bit; otherwise its
    parameters are new objects: build the optimiser afterwards.

    Args:
        op: the operator.
        old_grid, new_grid: (height, width), or a length for 1-D sequences.
        old_prefix, new_prefix: prefix tokens before the grid; None keeps their number.

    Raises:
        ValueError: an old grid that doesn't have the operator's number of tokens, or sizes < 1.

    >>> op = KArAtOperator(num_heads=2, num_tokens=17, config="g3b")
    >>> resample_operator(op, (4, 4), (6, 8), old_prefix=1, new_prefix=0).num_tokens
    48
    """
    old = token_grid(old_grid, old_prefix)
    new = token_grid(new_grid, old_prefix if new_prefix is None else new_prefix)
    if old.num_tokens != op.num_tokens:
        raise ValueError(
            f"the operator has {op.num_tokens} tokens, but {old.prefix} prefix tokens and a grid of "
            f"{old.height}x{old.width} make {old.num_tokens}; give its present grid (for a model, call "
            "karat.resample_tokens instead of the model's set_input_size)"
        )
    if old == new:
        return op
    for layer, axes in zip(op.edge_layers, op.layout.layers, strict=True):
        parameters, buffers = resampled_layer(layer, axes, old, new)
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, like(parameter, parameters[name]))
        for name, buffer in buffers.items():
            setattr(layer, name, buffer)
        layer.inputs, layer.outputs = (axis.size(new.num_tokens, op.config.rank) for axis in axes)
    maps, factors = resampled_maps(op, old, new)
    for name, value in maps.items():
        setattr(op, name, like(getattr(op, name), value))
    for name, value in factors.items():
        setattr(op, name, value)
    op.num_tokens = new.num_tokens
    return op


def _halvings(axes: Axes, old: TokenGrid, new: TokenGrid) -> float:
    """A power of two near what amplitudes of these axes are multiplied by.

    Factors take it instead of the parameters, which so keep about their size and rate (`karat.operator.rates`),
    the functions to the bit the same.
    """
    return 2.0 ** round(math.log2(old.cells / new.cells) * sum(axis.summed for axis in axes))


Tensors = dict[str, Tensor | None]


def resampled_layer(layer: EdgeLayer, axes: Axes, old: TokenGrid, new: TokenGrid) -> tuple[Tensors, Tensors]:
    """An edge layer's parameters and buffers on another grid, as differentiable functions of its own."""
    amplitudes = {id(parameter) for parameter in layer.amplitudes}
    halvings = _halvings(axes, old, new)
    parameters: Tensors = {}
    for name, x in layer._parameters.items():
        amplitude = id(x) in amplitudes
        value = None if x is None else _resample(x, axes, old, new, amplitude=amplitude)
        parameters[name] = value / halvings if amplitude and value is not None else value
    buffers: Tensors = dict(layer._buffers)
    factor = layer.factor.clone()
    for start, group in starts(layer.basis):
        if group.amplitude and not (group.name == "base" and layer.has_fixed_base):
            factor[start : start + group.count] *= halvings
    buffers["factor"] = factor
    if layer.has_fixed_base:
        buffers["base_gain"] = _resample(layer.base_gain, axes, old, new, amplitude=True)
    return parameters, buffers


def resampled_maps(op: KArAtOperator, old: TokenGrid, new: TokenGrid) -> tuple[Tensors, Tensors]:
    """W and C on another grid, as differentiable functions of the operator's, and their factors; those it has."""
    parameters: Tensors = {}
    buffers: Tensors = {}
    for name, axes in op.layout.maps.items():
        halvings = _halvings(axes, old, new)
        parameters[name] = _resample(getattr(op, name), axes, old, new, amplitude=True) / halvings
        buffers[f"{name}_factor"] = getattr(op, f"{name}_factor") * halvings
    return parameters, buffers


def _resample(x: Tensor, axes: Axes, old: TokenGrid, new: TokenGrid, *, amplitude: bool) -> Tensor:
    """`x` (..., a, b) with its axes of tokens carried over, and one that stands for all of them rescaled."""
    for dim, axis in zip((-2, -1), axes, strict=True):
        if axis.is_tokens:
            x = resample_axis(x, dim, old, new, amplitude=amplitude and axis.summed)
        elif axis.summed and amplitude:
            x = x * (old.cells / new.cells)
    return x


def like(parameter: nn.Parameter, value: Tensor | None) -> nn.Parameter:
    """`value` as a parameter that is trained if `parameter` is."""
    assert value is not None
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
