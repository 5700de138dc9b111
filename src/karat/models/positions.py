"""How a backbone's position embeddings start: as its own draws, or as sines and cosines of each patch's place."""

from __future__ import annotations

import math

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import nn

SINCOS = "sincos"


@torch.no_grad()
def start_as_sincos(model: nn.Module, strength: float = 1.0) -> None:
    """Start the learned position embeddings of a ViT, DeiT or ConViT as sines and cosines of row and column.

    The D numbers of the patch at (y, x) are sin(y ω), sin(x ω), cos(y ω), cos(x ω), with the D/4 frequencies
    ω_i = 10000^(−4i/D) (Chen et al. 2021; for ViT, Beyer et al. 2022), times `strength`. Their mean square is
    strength²/2, where timm's draws have 4e-4. Those of class and register tokens start at zero. All are trained.
    Weights that are loaded later, as by `karat train --init`, replace them.

    Raises ValueError for a model without such embeddings, of a width that is no multiple of 4, or a strength that isn't
    a positive number.

    >>> import karat
    >>> model = karat.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, pos_embed="sincos")
    >>> model.pos_embed.shape, round(float(model.pos_embed[:, 1:].square().mean().detach()), 3)
    (torch.Size([1, 17, 192]), 0.5)
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < math.inf:
        raise ValueError(f"pos_strength must be a positive number, got {strength!r}")
    embedding = getattr(model, "pos_embed", None)
    patches = getattr(model, "patch_embed", None)
    if not isinstance(embedding, nn.Parameter) or embedding.ndim != 3 or patches is None:
        raise ValueError(
            f"{type(model).__name__} has no learned position embedding for pos_embed=sincos to start: take a ViT, "
            "DeiT or ConViT"
        )
    grid, width = list(patches.grid_size), embedding.shape[-1]
    if width % 4:
        raise ValueError(f"pos_embed=sincos needs a width that is a multiple of 4, and this model's is {width}")
    places = build_sincos2d_pos_embed(grid, width, device=embedding.device)
    nn.init.zeros_(embedding)
    embedding[0, -len(places) :] = strength * places.to(embedding.dtype)
