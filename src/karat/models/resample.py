"""Models on another token grid: operators, position embeddings and biases, windows (SPEC §9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from karat.models.attach.resize import has_attached, resize_attached
from karat.models.backbones import BACKBONES, backbone_of


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
    operator lives on the window's grid. Any other converted model: an example is run at the new size, and key grids are
    told from the numbers of keys; a model without timm's `set_input_size` must take images of any size by itself.

    The same size leaves the model untouched, bit for bit. Otherwise parameters are new objects: build the optimiser
    afterwards.

    Args:
        model: a timm ViT, DeiT, ConViT or Swin, converted or not, or any converted model of images; not wrapped.
        img_size: side or (height, width) in pixels; None keeps it.
        num_prefix_tokens: ViT only; None keeps their number.
        window_size: Swin only.

    Returns:
        The model.

    Raises:
        ValueError: another kind of model, or a size or number of prefix tokens that it can't have.
    """
    if img_size is not None:
        sides = tuple(img_size) if isinstance(img_size, Iterable) else (img_size, img_size)
        if len(sides) != 2 or any(not isinstance(side, Integral) or side < 1 for side in sides):
            raise ValueError(
                f"img_size must be a side or (height, width) in pixels, whole numbers of at least 1, got {img_size!r}"
            )
        img_size = sides
    if has_attached(model):
        if num_prefix_tokens is not None or window_size is not None:
            raise ValueError(
                f"num_prefix_tokens and window_size are for models that karat knows, not "
                f"{type(model).__name__}; give img_size alone"
            )
        if img_size is not None:
            resize_attached(model, img_size=img_size)
        return model
    backbone = backbone_of(model)
    if window_size is not None and not (backbone and backbone.windows):
        raise ValueError(f"window_size is Swin's; {type(model).__name__} has no windows")
    if backbone is None or backbone.resample is None:
        known = ", ".join(family.__name__ for family, backbone in BACKBONES.items() if backbone.resample is not None)
        raise ValueError(
            f"{type(model).__name__} is no model that karat can resample; it knows timm's {known}, not wrapped"
        )
    backbone.resample(model, img_size, num_prefix_tokens, window_size)
    return model


class SetInputSize:
    """timm's `model.set_input_size` of a converted model: operators come along (SPEC §9).

    An object and not a closure, so that a copied or pickled model resamples itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As timm's own method, whose arguments it takes; other parameters are new objects afterwards."""
        if has_attached(self.model):
            resize_attached(self.model, *args, **kwargs)
            return
        backbone = backbone_of(self.model)
        assert backbone is not None  # karatize served it
        backbone.resize(self.model, *args, **kwargs)
