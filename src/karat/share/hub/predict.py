"""What a model says of image files: read, fitted and normalised as its configuration asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision import transforms

from karat.data.images import Fit, Normalise, read_file, read_image, to_uint8
from karat.models.evaluating import evaluating
from karat.runs.saved import ModelConfig

BATCH = 32


class Guess(NamedTuple):
    """A class and its probability, in [0, 1]."""

    name: str
    probability: float


def view(config: ModelConfig) -> Callable[[Image.Image], Tensor]:
    """How a picture becomes the model's input (C,H,W): resized to img_size / crop_pct, its centre cut, normalised."""
    (height, width), normalise = config.sides, Normalise(config.mean, config.std)
    fit: Callable[[Image.Image], Tensor]
    if height == width:
        fit = Fit(height, config.crop_pct, config.interpolation)
    else:
        larger = (int(height / config.crop_pct), int(width / config.crop_pct))
        resize = transforms.Resize(larger, interpolation=str_to_interp_mode(config.interpolation))
        fit = transforms.Compose([resize, transforms.CenterCrop((height, width)), to_uint8])
    return transforms.Compose([fit, normalise])


def read(source: str | Path | Image.Image, config: ModelConfig) -> Tensor:
    """A file or picture as the model's input (C,H,W). Raises ValueError for a file that isn't a whole image, or a model
    that takes neither grey nor colour."""
    if config.in_chans not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, this model takes {config.in_chans}: call it with tensors")
    if not isinstance(source, str | Path | Image.Image):
        raise ValueError(
            f"an image is a file or a PIL picture, got {type(source).__name__}: call the model with tensors"
        )
    chans = config.in_chans
    picture = read_image(source, chans) if isinstance(source, Image.Image) else read_file(Path(source), chans)
    return view(config)(picture)


@torch.no_grad()
def probabilities(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """softmax of the logits, (images, classes) float32 on the CPU; the model is put in evaluation mode meanwhile."""
    first = next(model.parameters())
    with evaluating(model):
        rows = [
            model(torch.stack(list(images[start : start + BATCH])).to(first.device, first.dtype)).float().softmax(-1)
            for start in range(0, len(images), BATCH)
        ]
    return torch.cat(rows).cpu() if rows else torch.empty(0, 0)


def guesses(row: Tensor, config: ModelConfig, top: int) -> list[Guess]:
    """The `top` likeliest classes of one row of probabilities, likeliest first; numbered where they have no names."""
    values, indices = row.topk(min(top, len(row)))
    names = config.class_names or tuple(map(str, range(len(row))))
    return [Guess(names[i], p) for p, i in zip(values.tolist(), indices.tolist(), strict=True)]
