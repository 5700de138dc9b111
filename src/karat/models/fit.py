"""Weights of one model brought to the sizes of another: position embeddings, operators, biases, channels (SPEC §9).

Nothing but names and tensors is known of the source, and the grid that its tokens lie on. An equal shape isn't taken
for an equal grid: 2×2 cells behind five prefix tokens are as many tokens as 3×3 cells are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Set
from dataclasses import replace
from math import isqrt
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor, nn

from karat.models.backbones import backbone_of
from karat.models.regrid import quiet_tables
from karat.models.relative_bias import RelativeBias, relative_biases
from karat.operator.operator import KArAtOperator, karat_operators
from karat.operator.token_grid import TokenGrid, resample_operator

POSITIONS, REGISTERS, TABLE = "pos_embed", "reg_token", "relative_position_bias_table"


# What torch puts into names where it wraps a module: by compile, in parallel, around checkpoints.
WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(weights: Mapping[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """Weights under a model's own names where these lie below others: torch's wrappers, or one that all have in common.

    >>> sorted(unwrapped({"module.model.a.b": torch.zeros(1), "module.model.c": torch.zeros(1)}, {"a.b", "c"}))
    ['a.b', 'c']
    """
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    found = plain if len(plain) == len(weights) and not any(map(WRAPPERS.search, own)) else dict(weights)
    while (
        not own & found.keys() and len({name.partition(".")[0] for name in found}) == 1 and all("." in n for n in found)
    ):
        found = {name.partition(".")[2]: tensor for name, tensor in found.items()}
    return found if own & found.keys() else dict(weights)


def check_numbers(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming a weight that is quantised where the model's isn't, or has numbers that aren't finite.

    where: what the message begins with.
    """
    for name, tensor in weights.items():
        if name in own and own[name].is_floating_point():
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{where}{name!r} is {kind}, quantised: give it as float32")
            if not tensor.float().isfinite().all():
                raise ValueError(f"{where}{name!r} has numbers that aren't finite: take weights from before that")


class Places(NamedTuple):
    """The tokens of a model: their grid, and how many of its prefix tokens have a position embedding."""

    grid: TokenGrid
    embedded: int


def places_of_weights(weights: Mapping[str, Tensor], prefer: int | None = None) -> Places | None:
    """What a ViT's weights say of its tokens, on a square grid unless they say otherwise; None where they don't say.

    Position embeddings may be there for all prefix tokens, for the class token alone (registers have none) or for no
    prefix token (deit3). Of two that could be, `prefer` goes first.
    """
    embedding = weights.get(POSITIONS)
    if embedding is None or embedding.ndim not in (3, 4):
        return None
    tokens = [weights[name] for name in ("cls_token", "dist_token", REGISTERS) if name in weights]
    prefix = sum(token.shape[1] for token in tokens if token.ndim == 3)
    if embedding.ndim == 4:  # (1,h,w,C)
        return Places(TokenGrid(prefix, *embedding.shape[1:3]), 0)
    ways = [prefix, min(1, int("cls_token" in weights)), 0]
    for embedded in ways if prefer is None or prefer not in ways else [prefer, *ways]:
        cells = embedding.shape[1] - embedded
        side = isqrt(max(cells, 0))
        if side and side * side == cells:
            return Places(TokenGrid(prefix, side, side), embedded)
    return None


def places_of(model: Any) -> Places | None:
    """A model's own; None where it has no one grid."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    backbone = backbone_of(model)
    if grid is None or (backbone is not None and backbone.windows):
        return None
    count = None if backbone is None else backbone.prefix
    prefix = int(getattr(model, "num_prefix_tokens", 0)) if count is None else count(model)
    embedding = getattr(model, POSITIONS, None)
    embedded = embedding.shape[1] - grid[0] * grid[1] if embedding is not None and embedding.ndim == 3 else 0
    return Places(TokenGrid(prefix, *grid), embedded)


@torch.no_grad()
def fit(
    model: nn.Module, weights: Mapping[str, Tensor], source: nn.Module | None = None
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights that go into `model`, in its shapes, and the names of those that were resized.

    source: the model that they are of, where it's known. An operator goes over whole or not at all.
    """
    new = places_of(model)
    old = places_of(source) if source is not None else None
    if old is None and new is not None:
        old = places_of_weights(weights, new.embedded)
    own = model.state_dict()
    found = {name: _fitting(name, weights[name], own[name], old, new) for name in own if name in weights}
    for name, op in karat_operators(model).items():
        window = _windows(name, model, weights, source)
        grids = window or (old and old.grid, new and new.grid)
        found |= _parts(name, op, weights, _operator(op, _below(name, weights), *grids))
    for name, bias in relative_biases(model).items():
        found |= _parts(name, bias, weights, _bias(bias, _below(name, weights)))
    for name in own:
        if name.endswith(TABLE) and name in weights:
            found[name] = _table(model.get_submodule(name.rpartition(".")[0]), weights[name])
    fitting = {name: tensor for name, tensor in found.items() if tensor is not None}
    return fitting, {name for name, tensor in fitting.items() if tensor is not weights[name]}


def _below(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def _parts(
    name: str, module: nn.Module, weights: Mapping[str, Tensor], fitted: Mapping[str, Tensor] | None
) -> dict[str, Tensor | None]:
    """A module's weights by their full names: those given where they're unchanged."""
    found: dict[str, Tensor | None] = {}
    for key in module.state_dict():
        full = f"{name}.{key}"
        value = None if fitted is None else fitted.get(key)
        same = value is not None and full in weights and torch.equal(value, weights[full])
        found[full] = weights[full] if same else value
    return found


def _fitting(name: str, found: Tensor, target: Tensor, old: Places | None, new: Places | None) -> Tensor | None:
    """One weight in the shape of its place, or None where it can't be brought there."""
    if name == POSITIONS and old is not None and new is not None and target.ndim == 3:
        return _positions(found, target, old, new)
    if found.shape == target.shape:
        return found
    if name == REGISTERS and found.ndim == 3 and found.shape[2] == target.shape[2]:  # the first ones; added are new
        return torch.cat([found[:, : target.shape[1]], target[:, found.shape[1] :].to(found)], dim=1)
    if name.startswith("patch_embed") and found.ndim == 4 and found.shape[1] == 1:
        found = found.repeat(1, 3, 1, 1) / 3  # grey pixels are colours of three equal parts
        if found.shape == target.shape:
            return found
    if name.startswith("patch_embed") and found.ndim == 4 and found.shape[2:] == target.shape[2:]:
        try:
            return torch.as_tensor(adapt_input_conv(target.shape[1], found)) if len(found) == len(target) else None
        except NotImplementedError:  # timm's word for a number of channels that it can't adapt
            return None
    return None


def _positions(found: Tensor, target: Tensor, old: Places, new: Places) -> Tensor | None:
    """Cells are interpolated as timm does it; a prefix token without an embedding is one with zero."""
    if found.shape[-1] != target.shape[-1] or target.shape[1] - new.embedded != new.grid.cells:
        return None
    flat = found.flatten(1, -2)
    if flat.shape[1] - old.embedded != old.grid.cells:
        return None
    sizes, before = (new.grid.height, new.grid.width), (old.grid.height, old.grid.width)
    if sizes == before and new.embedded == old.embedded and found.shape == target.shape:
        return found
    prefix, cells = flat.split([old.embedded, old.grid.cells], dim=1)
    cells = resample_abs_pos_embed(cells, list(sizes), list(before), num_prefix_tokens=0)
    added = cells.new_zeros(1, max(0, new.embedded - old.embedded), cells.shape[-1])
    return torch.cat([prefix[:, : new.embedded], added, cells], dim=1)


def _windows(
    name: str, model: nn.Module, weights: Mapping[str, Tensor], source: nn.Module | None
) -> tuple[TokenGrid | None, TokenGrid] | None:
    """The windows that an operator lies on in the source and in the model; None where it sees all tokens."""
    above = name.rpartition(".")[0]
    mine = getattr(model.get_submodule(above), "window_size", None) if above else None
    if mine is None:
        return None
    theirs: Any = None
    if source is not None and above in dict(source.named_modules()):
        theirs = getattr(source.get_submodule(above), "window_size", None)
    elif f"{above}.{TABLE}" in weights:
        side = (isqrt(len(weights[f"{above}.{TABLE}"])) + 1) // 2
        theirs = (side, side)
    return (None if theirs is None else TokenGrid(0, *theirs)), TokenGrid(0, *mine)


def _operator(
    op: KArAtOperator, weights: dict[str, Tensor], old: TokenGrid | None, new: TokenGrid | None
) -> dict[str, Tensor] | None:
    """An operator's weights, all of them, on the grid of `op`; None where they're another's."""
    if old is None or new is None or old == new or new.num_tokens != op.num_tokens:
        return weights if _same_shapes(op, weights) and old in (None, new) else None
    twin = resample_operator(
        copy.deepcopy(op), (new.height, new.width), (old.height, old.width), new.prefix, old.prefix
    )
    if not _same_shapes(twin, weights):
        return None
    twin.load_state_dict(weights)
    resample_operator(twin, (old.height, old.width), (new.height, new.width), old.prefix, new.prefix)
    return dict(twin.state_dict())


def same_rates(op: KArAtOperator, weights: Mapping[str, Tensor], num_tokens: int) -> bool:
    """Whether an operator's weights, on so many tokens, may be of `op`'s settings, by the factors of its edge layers.

    Basis, order, rank and number of tokens make them, each resampling multiplies them by a power of two
    (`karat.operator.rates`). Factors of one, those of everything that was saved before there were any, may be of any.
    """
    own = {key: x for key, x in weights.items() if key.startswith("layers.") and key.endswith(".factor")}
    if all((x == 1).all() for x in own.values()):
        return True
    with torch.random.fork_rng(devices=()):
        fresh = KArAtOperator(op.num_heads, num_tokens, replace(op.config, init="default", init_scale=1.0))
    for index, layer in enumerate(fresh.edge_layers):
        found = own.get(f"layers.{index}.factor")
        if found is None or found.shape != layer.factor.shape:
            return False
        steps = (found / layer.factor).double().log2()
        if not torch.allclose(steps, steps.round(), atol=1e-3):
            return False
    return True


def _same_shapes(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    return {name: tensor.shape for name, tensor in module.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }


def _bias(bias: RelativeBias, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A relative position bias, whose table says on which grid it is."""
    table = weights.get("table")
    if table is None or table.ndim != 3 or len(table) != len(bias.table):
        return None
    grid = (int(table.shape[1]) + 1) // 2, (int(table.shape[2]) + 1) // 2
    twin = RelativeBias(len(table), grid, int("prefix_table" in weights))
    if not _same_shapes(twin, weights):
        return None
    twin.load_state_dict(weights)
    twin.resample(bias.grid, bias.prefix)
    return dict(twin.state_dict())


def _table(attn: Any, found: Tensor) -> Tensor | None:
    """Swin's table of a window's relative positions."""
    shape = attn.relative_position_bias_table.shape
    if found.shape == shape:
        return found
    if found.ndim != 2 or found.shape[1] != shape[1]:
        return None
    side = (isqrt(len(found)) + 1) // 2
    if (2 * side - 1) ** 2 != len(found):  # of a window that isn't square, whose sides it doesn't say
        return None
    with quiet_tables():
        resized: Tensor = resize_rel_pos_bias_table(
            found, new_window_size=attn.window_size, new_bias_shape=shape, old_window_size=(side, side)
        )
    return resized
