"""How each family of models is carried to another token grid, in place (SPEC §9).

`resize_…` (model, arguments of timm's `set_input_size`): timm's own method, and what is karat's after it.
`resample_…` (model, img_size, num_prefix_tokens, window_size), None for what stays: see `karat.resample_tokens`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import nn

from karat.models.attention import KArAtWindowAttention
from karat.models.relative_bias import relative_biases
from karat.operator.operator import karat_operators
from karat.operator.token_grid import like, resample_operator


@contextlib.contextmanager
def quiet_tables() -> Iterator[None]:
    """Within, timm interpolates tables of biases, where it indexes in a way that torch deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
        yield


@torch.no_grad()
def resize_grid(model: Any, *args: Any, **kwargs: Any) -> None:
    """Operators and biases of the whole grid. Raises ValueError, the model unchanged, if they aren't on it now."""
    old, prefix = tuple(model.patch_embed.grid_size), int(model.num_prefix_tokens)
    for op in karat_operators(model).values():
        resample_operator(op, old, old, prefix)  # the check alone
    type(model).set_input_size(model, *args, **kwargs)
    _carry(model, old, tuple(model.patch_embed.grid_size), prefix, prefix)


@torch.no_grad()
def resize_windows(model: Any, *args: Any, **kwargs: Any) -> None:
    """Operators on windows. Raises ValueError where they aren't on the model's present ones."""
    converted = [module for module in model.modules() if isinstance(module, KArAtWindowAttention)]
    windows = [module.window_size for module in converted]
    with quiet_tables():
        type(model).set_input_size(model, *args, **kwargs)
    for module, old_window in zip(converted, windows, strict=True):
        resample_operator(module.operator, old_window, module.window_size)


def _carry(model: nn.Module, old: tuple[int, int], new: tuple[int, int], old_prefix: int, prefix: int) -> None:
    """Operators and relative position biases to another grid; ValueError before anything changes."""
    for op in karat_operators(model).values():
        resample_operator(op, old, new, old_prefix, prefix)
    for bias in relative_biases(model).values():
        bias.resample(new, prefix)


def check_patches(model: Any, img_size: Sequence[int] | None = None) -> None:
    """Raise ValueError where patches don't divide images of that size, None for the model's: pixels would be cut off.

    A model without patches is served, as is one that pads its images.
    """
    check_holds_patch(model, img_size)
    for side, patch in _sides(model, img_size):
        if side % patch:
            fits = side - side % patch
            raise ValueError(
                f"img_size={side} is no multiple of the patch size {patch}: {side % patch} pixels would be cut off; "
                f"give {fits} or {fits + patch}, or another patch size"
            )


def check_holds_patch(model: Any, img_size: Sequence[int] | None = None) -> None:
    """Raise ValueError where images of that size, None for the model's, are smaller than a patch."""
    for side, patch in _sides(model, img_size):
        if side < patch:
            raise ValueError(f"img_size={side} is smaller than a patch of {patch} pixels; give {patch} or more")


def _sides(model: Any, img_size: Sequence[int] | None) -> list[tuple[int, int]]:
    """Height and width of the images, each with the patch's; nothing where patches cut off no pixels."""
    patches = getattr(model, "patch_embed", getattr(model, "stem", None))  # mixers call it the stem
    sides = img_size or getattr(patches, "img_size", None)
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad or sides is None:
        return []
    return list(zip(sides, patches.patch_size, strict=True))


def _new_grid(model: Any, img_size: tuple[int, int] | None) -> tuple[int, int]:
    """The patch grid that `img_size` gives."""
    if img_size is None or img_size == tuple(model.patch_embed.img_size):
        return tuple(model.patch_embed.grid_size)
    check_patches(model, img_size)
    return tuple(model.patch_embed.dynamic_feat_size(img_size))


def resample_vit(model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, _: Any) -> None:
    old_grid, old_prefix = tuple(model.patch_embed.grid_size), int(model.num_prefix_tokens)
    grid, prefix = _new_grid(model, img_size), old_prefix if num_prefix is None else num_prefix
    if prefix != old_prefix:
        _check_prefix(model, prefix)
    _carry(model, old_grid, grid, old_prefix, prefix)  # first: it checks the number of tokens
    if img_size is not None and tuple(model.patch_embed.img_size) != img_size:
        type(model).set_input_size(model, img_size=img_size)
    if prefix != old_prefix:
        _set_prefix(model, prefix)


def _check_prefix(model: Any, prefix: int) -> None:
    if prefix < 0:
        raise ValueError(f"num_prefix_tokens must be >= 0, got {prefix}")
    if hasattr(model, "head_dist"):
        raise ValueError(
            f"num_prefix_tokens={prefix}: the heads of a distilled model read its class and distillation tokens, so it "
            "keeps both; use num_prefix_tokens=None or a model without the distillation token"
        )
    if prefix == 0 and model.has_class_token and model.global_pool == "prr":
        raise ValueError("num_prefix_tokens=0: global_pool='prr' reads the class token; build with another global_pool")


def _set_prefix(model: Any, prefix: int) -> None:
    """Drop a ViT's last prefix tokens, or add registers, and fit its position embedding."""
    old_prefix = int(model.num_prefix_tokens)
    if prefix == 0 and model.has_class_token:
        model.cls_token, model.has_class_token = None, False
        model.global_pool = "avg" if model.global_pool == "token" else model.global_pool
    registers = prefix - int(model.has_class_token)
    old = model.reg_token
    if registers == 0:
        model.reg_token = None
    else:
        kept = model.patch_embed.proj.weight.new_empty(1, 0, model.embed_dim) if old is None else old[:, :registers]
        added = nn.init.normal_(kept.new_empty(1, registers - kept.shape[1], model.embed_dim), std=1e-6)
        model.reg_token = nn.Parameter(torch.cat([kept, added], dim=1), requires_grad=old is None or old.requires_grad)
    if model.pos_embed is not None and not model.no_embed_class:
        own, cells = model.pos_embed.split([old_prefix, model.pos_embed.shape[1] - old_prefix], dim=1)
        added = cells.new_zeros(1, max(0, prefix - old_prefix), cells.shape[-1])
        model.pos_embed = like(model.pos_embed, torch.cat([own[:, :prefix], added, cells], dim=1))
    model.num_prefix_tokens, model.num_reg_tokens = prefix, registers


def resample_convit(model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, _: Any) -> None:
    prefix = int(model.num_prefix_tokens)
    if num_prefix not in (None, prefix):
        raise ValueError(
            f"num_prefix_tokens={num_prefix}: ConViT adds its class token between blocks and keeps it; use None"
        )
    old_grid, grid = tuple(model.patch_embed.grid_size), _new_grid(model, img_size)
    if grid[0] != grid[1]:
        raise ValueError(
            f"img_size={img_size}: ConViT's gated positional attention needs a square token grid, got {grid}"
        )
    _carry(model, old_grid, grid, prefix, prefix)
    if img_size is None or tuple(model.patch_embed.img_size) == img_size:
        return
    model.patch_embed.set_input_size(img_size=img_size)
    model.num_patches = math.prod(grid)
    if model.use_pos_embed and grid != old_grid:
        embedding = resample_abs_pos_embed(
            model.pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=0
        )
        model.pos_embed = like(model.pos_embed, embedding)


def resample_swin(
    model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, window_size: int | Sequence[int] | None
) -> None:
    if num_prefix not in (None, 0):
        raise ValueError(f"num_prefix_tokens={num_prefix}: Swin has no prefix tokens; use None")
    _new_grid(model, img_size)
    changes_size = img_size is not None and tuple(model.patch_embed.img_size) != img_size
    if not changes_size and window_size is None:
        return
    resize_windows(model, img_size=img_size if changes_size else None, window_size=window_size)
