"""Models whose token grid changes while they are used: timm's `set_input_size`, and `dynamic_img_size` (SPEC §9)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import TokenGrid, resampled_layer, resampled_maps

MOST_GRIDS = 16  # kept for each operator; the one used longest ago goes first

_Key = tuple[Any, ...]
_views: WeakKeyDictionary[KArAtOperator, dict[_Key, KArAtOperator]] = WeakKeyDictionary()


def on_grid(op: KArAtOperator, old: TokenGrid, new: TokenGrid) -> KArAtOperator:
    """The operator as `karat.resample_operator` would make it, without changing it: same results, same gradients.

    Its parameters are functions of `op`'s, so gradients reach those. Where none are asked for (torch.no_grad, or
    nothing to train) it's made once for each grid and kept until a parameter of `op` changes, is moved or is loaded;
    what is written past autograd's notice, through `parameter.data`, goes unseen. The same grid gives `op` itself.
    """
    if old == new:
        return op
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in op.parameters())
    if trained or any(parameter.is_inference() for parameter in op.parameters()):  # those don't tell of changes
        return _view(op, old, new)
    kept = _views.setdefault(op, {})
    key = (old, new, *_state((*op.parameters(), *op.buffers())))
    view = kept.pop(key, None)
    if view is None:
        for other in [other for other in kept if other[2:] != key[2:]]:
            del kept[other]  # of parameters that are no more
        with torch.inference_mode(False), torch.no_grad():
            view = _view(op, old, new)
    kept[key] = view  # last: the most recently used
    if len(kept) > MOST_GRIDS:
        del kept[next(iter(kept))]
    return view


def _state(parameters: Iterable[Tensor]) -> _Key:
    """Changes with every change of these tensors: other objects, another place, precision, or numbers written."""
    return tuple((id(p), p.data_ptr(), p.dtype, p.device, p._version) for p in parameters)


def _view(op: KArAtOperator, old: TokenGrid, new: TokenGrid) -> KArAtOperator:
    view = _like(op)
    view.num_tokens = new.num_tokens
    layers = nn.ModuleList()
    for layer, axes in zip(op.edge_layers, op.layout.layers, strict=True):
        own = _like(layer)
        own._parameters, own._buffers = resampled_layer(layer, axes, old, new)
        own.inputs, own.outputs = (axis.size(new.num_tokens, op.config.rank) for axis in axes)
        layers.append(own)
    view._modules["layers"] = layers
    maps, factors = resampled_maps(op, old, new)
    view._parameters.update(maps)
    view._buffers.update(factors)
    return view.train(op.training)


def _like(module: Any) -> Any:
    """A module of the same kind and settings that shares nothing that may be replaced in it."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin


class GridWatch:
    """A forward hook of a ViT's patch embedding: remembers the grid of the images at hand beside the model's own.

    With dynamic_img_size an image of any size passes, and the attention modules, which see nothing but tokens, ask
    here on which grid they lie. Gradient checkpointing asks again in the backward pass, when other images may have
    passed since: grids are therefore kept by their number of cells, and two of one number are refused then.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.grids: dict[int, tuple[int, int]] = {}

    def __call__(self, patch_embed: Any, args: Any, output: Tensor) -> None:
        """Note the grid; the output of a dynamic patch embedding is (B,h,w,C)."""
        grid = int(output.shape[1]), int(output.shape[2])
        before = self.grids.get(grid[0] * grid[1], grid)
        if before != grid and torch.is_grad_enabled() and self.model.grad_checkpointing:
            raise ValueError(
                f"gradient checkpointing can't tell images of {grid} tokens from those of {before} that came before; "
                "keep to one of both, or switch it off: model.set_grad_checkpointing(False)"
            )
        self.grids[grid[0] * grid[1]] = grid

    def operator(self, op: KArAtOperator, num_tokens: int) -> KArAtOperator:
        """`op` on the grid of the images that have so many tokens, prefix tokens included."""
        old = tuple(self.model.patch_embed.grid_size)
        prefix = op.num_tokens - old[0] * old[1]
        new = self.grid_of(num_tokens, prefix)
        return op if new is None else on_grid(op, TokenGrid(prefix, *old), TokenGrid(prefix, *new))

    def grid_of(self, num_tokens: int, prefix: int) -> tuple[int, int] | None:
        """(height, width) of the images that have so many tokens, `prefix` of them no cells; None if none had."""
        return self.grids.get(num_tokens - prefix)
