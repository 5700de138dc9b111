"""A plain ViT as the trunk of a detector: most blocks see windows, a few the whole image (ViTDet, arXiv 2203.16527)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from karat.detect.attention import GridAttention
from karat.models.backbones import backbone_of
from karat.models.create import ModelArgumentsError, create_model, rebuild_model
from karat.operator.token_grid import resample_operator

WINDOW = 14


def global_blocks(depth: int) -> tuple[int, ...]:
    """The blocks that see the whole image: the last of each quarter of the depth, or all where there are fewer than 4.

    >>> global_blocks(12), global_blocks(24), global_blocks(6)
    ((2, 5, 8, 11), (5, 11, 17, 23), (0, 2, 3, 5))
    """
    parts = min(depth, 4)
    return tuple((i + 1) * depth // parts - 1 for i in range(parts))


class Trunk(nn.Module):
    """A timm ViT without class token and head, as a map from images to one map of features, that of its last block.

    images (B,3,S,S) and the sizes of what isn't padding in them -> (B,C,S/patch,S/patch). Cells that lie in the padding
    altogether are no keys of any attention. As everything else in a block acts on each token alone, a windowed block is
    the block itself applied to windows; windows that reach over the grid's edge are filled with masked cells.
    (Stochastic depth therefore drops a window's residual where ViTDet drops an image's.)

    Made by `create_trunk`, or by `to_grid` of a ViT that is there already.
    """

    def __init__(self, vit: Any, window: int, whole: Sequence[int]) -> None:
        super().__init__()
        self.vit = vit
        self.window, self.global_blocks = window, frozenset(whole)
        self.num_features: int = vit.embed_dim
        self.stride: int = vit.patch_embed.patch_size[0]
        self.img_size: int = vit.patch_embed.img_size[0]
        self.grad_checkpointing = False

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """images (B,3,S,S); sizes: (height, width) of each image without its padding, None: no padding."""
        vit, side = self.vit, self.img_size // self.stride
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        x = x.unflatten(1, (side, side))  # (B,g,g,C)
        valid = None if sizes is None else self.valid_cells(sizes, images.device)
        whole_mask = None if valid is None else valid.flatten(1)[:, None, None]  # (B,1,1,N)
        window_mask = self._window_mask(valid, len(images), images.device)
        for index, block in enumerate(vit.blocks):
            if index in self.global_blocks:
                x = self._run(block, x.flatten(1, 2), whole_mask).unflatten(1, (side, side))
                continue
            windows, padded = window_partition(x, self.window)
            seen = self._run(block, windows.flatten(1, 2), window_mask)
            x = window_unpartition(seen, self.window, (side, side), padded)
        return x.permute(0, 3, 1, 2).contiguous()

    def _run(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, mask, use_reentrant=False)
        out: Tensor = block(x, mask)
        return out

    def valid_cells(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor | None:
        """(B,g,g) boolean, whether any pixel of a cell is the image's; None where no cell is padding."""
        side = self.img_size // self.stride
        cells = [[-(-length // self.stride) for length in size] for size in sizes]
        if all(min(size) >= side for size in cells):
            return None
        steps = torch.arange(side, device=device)
        heights, widths = torch.tensor(cells, device=device).unbind(1)
        return (steps < heights[:, None])[:, :, None] & (steps < widths[:, None])[:, None, :]

    def _window_mask(self, valid: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """The same for windows, (B·windows,1,1,window²), cells beyond the grid's edge included."""
        side = self.img_size // self.stride
        if valid is None and side % self.window == 0:
            return None
        if valid is None:
            valid = torch.ones(batch, side, side, dtype=torch.bool, device=device)
        beyond = -side % self.window
        windows, _ = window_partition(F.pad(valid, (0, beyond, 0, beyond)).unsqueeze(-1), self.window)
        return windows.flatten(1)[:, None, None]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable


def create_trunk(
    name: str,
    attention: str,
    *,
    img_size: int = 224,
    window: int = WINDOW,
    whole: Sequence[int] | None = None,
    relative: bool = False,
    **timm_kwargs: Any,
) -> Trunk:
    """A new trunk from timm's ViT of that name.

    Args:
        name: a timm ViT, e.g. vit_tiny_patch16_224.
        attention: softmax or a karat attention, e.g. g3b. Its operators are drawn on the window's grid, N = window²,
            and then carried to the grids on which they work, see `to_grid`.
        img_size: side S of the images in pixels, a multiple of the patch size.
        window: side of a window in tokens; whole: indices of the global blocks, None: `global_blocks(depth)`.
        relative: whether attention has relative positions.
        timm_kwargs: passed on: patch_size, embed_dim, depth, num_heads, drop_path_rate, ...

    Raises ValueError for a model that is no ViT, or sizes that don't fit.
    """
    try:
        known: Any = rebuild_model(name, "softmax", num_classes=0, **(timm_kwargs | {"depth": 1}))  # of any side
    except ModelArgumentsError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        known = None  # it doesn't take an argument that only ViTs have
    backbone = backbone_of(known)
    if backbone is None or not backbone.plain:
        raise ValueError(f"{name} is no plain ViT, which a detector's trunk must be: e.g. vit_tiny_patch16_224")
    patch: int = known.patch_embed.patch_size[0]
    kwargs = {"class_token": False, "global_pool": "avg", "num_classes": 0, "img_size": window * patch, **timm_kwargs}
    return to_grid(create_model(name, attention, **kwargs), img_size, window, whole, relative)


def resize_embeddings(vit: Any, img_size: int) -> None:
    """timm's own set_input_size: that of a converted model would move the operators, which have grids of their own."""
    type(vit).set_input_size(vit, img_size=(img_size, img_size))


def to_grid(
    vit: Any, img_size: int, window: int = WINDOW, whole: Sequence[int] | None = None, relative: bool = False
) -> Trunk:
    """A trunk out of a timm ViT without prefix tokens, whose token grid is (window, window); it is taken over.

    Windowed blocks keep their operators. Global blocks work on the grid of the whole image: where that is another one,
    their own operators are carried there once (blockwise), a shared one is resampled whenever it is used (universal).
    Position embeddings are resampled.
    """
    side, patch = window, vit.patch_embed.patch_size[0]
    if vit.num_prefix_tokens or tuple(vit.patch_embed.grid_size) != (side, side):
        raise ValueError(
            f"the ViT has {vit.num_prefix_tokens} prefix tokens and a grid of {tuple(vit.patch_embed.grid_size)}; "
            f"carry it to no prefix tokens and {(side, side)} with karat.resample_tokens first"
        )
    if img_size % patch or img_size < patch:
        raise ValueError(f"img_size={img_size} must be a multiple of the patch size {patch}")
    depth = len(vit.blocks)
    whole = global_blocks(depth) if whole is None else tuple(whole)
    if any(not 0 <= index < depth for index in whole):
        raise ValueError(f"global blocks {whole}: the model has blocks 0 to {depth - 1}")
    base, grid = (side, side), (img_size // patch,) * 2
    for index, block in enumerate(vit.blocks):
        here = grid if index in whole else base
        if "operator" in block.attn._modules and here != base:
            resample_operator(block.attn.operator, base, here)
        block.attn = GridAttention(block.attn, here, base, relative)
    resize_embeddings(vit, img_size)
    for name in ("norm", "fc_norm", "head_drop", "head"):  # ViTDet reads the last block as it is
        setattr(vit, name, nn.Identity())
    return Trunk(vit, window, whole)
