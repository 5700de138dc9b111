"""Operators carried to another token grid: another image size, another window, other prefix tokens (SPEC §9).

What an operator learned is indexed by token position, so it's a function on the token grid and is interpolated as
position embeddings are. Amplitudes are scaled by cells_old/cells_new along every token axis, so that sums over keys
keep their size; shapes (τ, s, denominators) are interpolated as they are. Of a product s_f·c one factor, c, is scaled.

Prefix tokens (class, registers) keep their own values, unscaled. Dropping keeps the first ones. An added one starts
as an absent term: amplitudes 0, so that it neither adds to the operator's sums nor receives weight in σ, and shapes
of the grid's mean; it learns from there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.convit import ConVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from karat.attention import CONVERTED
from karat.convert import karat_operators
from karat.operator import KArAtOperator


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
    """A TokenGrid from (height, width), or from a length for 1-D sequences; ValueError for sizes < 1."""
    sizes = (1, grid) if isinstance(grid, int) else (1,) * (2 - len(grid)) + tuple(grid)
    if len(sizes) != 2 or any(size < 1 for size in sizes):
        raise ValueError(f"a token grid is a length or (height, width), of at least 1, got {grid!r}")
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
    PhiPhi Φ₁'s keys and Φ₂'s outputs. The same grid and prefix leave the operator untouched, bit for bit; otherwise
    its parameters are new objects: build the optimiser afterwards.

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
    for name, value in resampled_tensors(op, old, new).items():
        parent, _, leaf = name.rpartition(".")
        module = op.get_submodule(parent)
        present = getattr(module, leaf)
        setattr(module, leaf, _like(present, value) if isinstance(present, nn.Parameter) else value)
    sizes = {"N": new.num_tokens}
    for layer, shape in zip(op.edge_layers, op.order.layer_shapes, strict=True):
        layer.inputs, layer.outputs = sizes.get(shape[0], layer.inputs), sizes.get(shape[1], layer.outputs)
    op.num_tokens = new.num_tokens
    return op


def resampled_tensors(op: KArAtOperator, old: TokenGrid, new: TokenGrid) -> dict[str, Tensor]:
    """The operator's tensors that have a token axis, carried to another grid, by their names in `op`.

    Differentiable: gradients reach the operator's own parameters, which stay as they are.
    """
    carried: dict[str, Tensor] = {}
    for index, (layer, shape) in enumerate(zip(op.edge_layers, op.order.layer_shapes, strict=True)):
        amplitudes = {id(parameter) for parameter in layer.amplitudes}
        for name, parameter in layer.named_parameters():
            amplitude = id(parameter) in amplitudes
            carried[f"layers.{index}.{name}"] = _resample(parameter, shape, old, new, amplitude=amplitude)
        for name, gain in layer.named_buffers():
            carried[f"layers.{index}.{name}"] = _resample(gain, shape, old, new, amplitude=True)
    if op.W is not None:
        assert op.order.projector_shape is not None
        carried["W"] = _resample(op.W, op.order.projector_shape, old, new, amplitude=True)
    return carried


def _resample(x: Tensor, shape: str, old: TokenGrid, new: TokenGrid, *, amplitude: bool) -> Tensor:
    """`x` (..., a, b) with the axes that `shape`, two letters, calls N carried over."""
    for dim, letter in zip((-2, -1), shape, strict=True):
        if letter == "N":
            x = resample_axis(x, dim, old, new, amplitude=amplitude)
    return x


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


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
    if img_size is not None and tuple(model.patch_embed.img_size) != img_size:
        model.set_input_size(img_size=img_size)
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
        model.pos_embed = _like(model.pos_embed, torch.cat([own[:, :prefix], added, cells], dim=1))
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
    if img_size is None or tuple(model.patch_embed.img_size) == img_size:
        return
    model.patch_embed.set_input_size(img_size=img_size)
    model.num_patches = math.prod(grid)
    if model.use_pos_embed and grid != old_grid:
        embedding = resample_abs_pos_embed(
            model.pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=0
        )
        model.pos_embed = _like(model.pos_embed, embedding)


def _resample_swin(
    model: Any, img_size: tuple[int, int] | None, num_prefix: int | None, window_size: int | Sequence[int] | None
) -> None:
    if num_prefix not in (None, 0):
        raise ValueError(f"num_prefix_tokens={num_prefix}: Swin has no prefix tokens; use None")
    _new_grid(model, img_size)
    changes_size = img_size is not None and tuple(model.patch_embed.img_size) != img_size
    if not changes_size and window_size is None:
        return
    converted: list[Any] = [module for module in model.modules() if isinstance(module, CONVERTED)]
    windows = [module.window_size for module in converted]
    with warnings.catch_warnings():  # timm's interpolation of the bias tables indexes in a way that torch deprecates
        warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
        model.set_input_size(img_size=img_size if changes_size else None, window_size=window_size)
    for module, old_window in zip(converted, windows, strict=True):
        resample_operator(module.operator, old_window, module.window_size)


# How each family of models is resampled.
RESAMPLERS: dict[type[nn.Module], Callable[..., None]] = {
    VisionTransformer: _resample_vit,
    ConVit: _resample_convit,
    SwinTransformer: _resample_swin,
}
