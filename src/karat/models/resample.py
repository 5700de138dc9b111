"""Models on another token grid: operators, position embeddings and biases, windows (SPEC §9)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.convit import ConVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from karat.models.attention import CONVERTED
from karat.models.relative_bias import relative_biases
from karat.operator.operator import karat_operators
from karat.operator.token_grid import like, resample_operator


@torch.no_grad()
def resample_tokens(
    model: nn.Module,
    img_size: int | Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    window_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """Carry a model to another image size or number of prefix tokens, in place: operators and position embeddings.

    Works for softmax models too, where only the position embeddings are concerned.

    ViT, DeiT: position embeddings by timm's own resampling. Dropped prefix tokens are the last ones (class token
    first, registers after it); a model that loses its class token pools by the average from then on. Added ones are
    registers, with timm's initial value and a position embedding of zero.
    ConViT: square grids only. Swin: windows grow with the image as timm does it, unless `window_size` is given; an
    operator lives on the window's grid.

    The same size leaves the model untouched, bit for bit. Otherwise parameters are new objects: build the optimiser
    afterwards.

    Args:
        model: a timm ViT, DeiT, ConViT or Swin, converted or not; not wrapped.
        img_size: side or (height, width) in pixels; None keeps it.
        num_prefix_tokens: ViT only; None keeps their number.
        window_size: Swin only.

    Returns:
        The model.

    Raises:
        ValueError: another kind of model, or a size or number of prefix tokens that it can't have.
    """
    if img_size is not None:
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(img_size) != 2 or any(side < 1 for side in img_size):
            raise ValueError(f"img_size must be a side or (height, width) in pixels, got {img_size}")
    if window_size is not None and not isinstance(model, SwinTransformer):
        raise ValueError(f"window_size is Swin's; {type(model).__name__} has no windows")
    for family, resampler in RESAMPLERS.items():
        if isinstance(model, family):
            resampler(model, img_size, num_prefix_tokens, window_size)
            return model
    known = ", ".join(family.__name__ for family in RESAMPLERS)
    raise ValueError(
        f"{type(model).__name__} is no model that karat can resample; it knows timm's {known}, not wrapped"
    )


@torch.no_grad()
def follow_input_size(model: Any, *args: Any, **kwargs: Any) -> None:
    """timm's `set_input_size` of this kind of model, with the arguments it takes, operators resampled after it.

    Raises ValueError where the operators aren't on the model's present grid; a ViT is unchanged then.
    """
    change = type(model).set_input_size
    if isinstance(model, SwinTransformer):
        converted: list[Any] = [module for module in model.modules() if isinstance(module, CONVERTED)]
        windows = [module.window_size for module in converted]
        with warnings.catch_warnings():  # timm's interpolation of the bias tables indexes in a way torch deprecates
            warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
            change(model, *args, **kwargs)
        for module, old_window in zip(converted, windows, strict=True):
            resample_operator(module.operator, old_window, module.window_size)
        return
    old, prefix = tuple(model.patch_embed.grid_size), int(model.num_prefix_tokens)
    for op in karat_operators(model).values():
        resample_operator(op, old, old, prefix)  # the check alone
    change(model, *args, **kwargs)
    for op in karat_operators(model).values():
        resample_operator(op, old, tuple(model.patch_embed.grid_size), prefix)
    for bias in relative_biases(model).values():
        bias.resample(tuple(model.patch_embed.grid_size), prefix)


class SetInputSize:
    """timm's `model.set_input_size` of a converted model: operators come along (SPEC §9).

    An object and not a closure, so that a copied or pickled model resamples itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As timm's own method, whose arguments it takes; other parameters are new objects afterwards."""
        follow_input_size(self.model, *args, **kwargs)


def _new_grid(model: Any, img_size: tuple[int, int] | None) -> tuple[int, int]:
    """The patch grid that `img_size` gives."""
    if img_size is None:
        return tuple(model.patch_embed.grid_size)
    grid = tuple(model.patch_embed.dynamic_feat_size(img_size))
    if min(grid) < 1:
        raise ValueError(
            f"img_size={img_size} is smaller than a patch {model.patch_embed.patch_size}; give a larger one"
        )
    return grid


def _resample_vit(model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, _: Any) -> None:
    old_grid, old_prefix = tuple(model.patch_embed.grid_size), int(model.num_prefix_tokens)
    grid, prefix = _new_grid(model, img_size), old_prefix if num_prefix is None else num_prefix
    if prefix != old_prefix:
        _check_prefix(model, prefix)
    for op in karat_operators(model).values():  # first: it checks the number of tokens before anything else changes
        resample_operator(op, old_grid, grid, old_prefix, prefix)
    for bias in relative_biases(model).values():
        bias.resample(grid, prefix)
    if img_size is not None and tuple(model.patch_embed.img_size) != img_size:
        type(model).set_input_size(model, img_size=img_size)
    if prefix != old_prefix:
        _set_prefix(model, prefix)


def _check_prefix(model: Any, prefix: int) -> None:
    if prefix < 0:
        raise ValueError(f"num_prefix_tokens must be >= 0, got {prefix}")
    if isinstance(model, VisionTransformerDistilled):
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


def _resample_convit(model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, _: Any) -> None:
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
    for op in karat_operators(model).values():
        resample_operator(op, old_grid, grid, prefix, prefix)
    for bias in relative_biases(model).values():
        bias.resample((grid[0], grid[1]), bias.prefix)
    if img_size is None or tuple(model.patch_embed.img_size) == img_size:
        return
    model.patch_embed.set_input_size(img_size=img_size)
    model.num_patches = math.prod(grid)
    if model.use_pos_embed and grid != old_grid:
        embedding = resample_abs_pos_embed(
            model.pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=0
        )
        model.pos_embed = like(model.pos_embed, embedding)


def _resample_swin(
    model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, window_size: int | Sequence[int] | None
) -> None:
    if num_prefix not in (None, 0):
        raise ValueError(f"num_prefix_tokens={num_prefix}: Swin has no prefix tokens; use None")
    _new_grid(model, img_size)
    changes_size = img_size is not None and tuple(model.patch_embed.img_size) != img_size
    if not changes_size and window_size is None:
        return
    follow_input_size(model, img_size=img_size if changes_size else None, window_size=window_size)


# How each family of models is resampled.
RESAMPLERS: dict[type[nn.Module], Callable[..., None]] = {
    VisionTransformer: _resample_vit,
    ConVit: _resample_convit,
    SwinTransformer: _resample_swin,
}
