"""One image, from its file or bytes to the pixels that a model takes, without randomness."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

MODES = {1: "L", 3: "RGB"}
JPEG = b"\xff\xd8"  # how a JPEG file begins


def read_image(source: Any, in_chans: int = 3) -> Image.Image:
    """A PIL image in colour (in_chans 3) or grey (1), from a path, bytes, an array (H,W[,3]) or an image.

    Raises whatever PIL does where there is no whole image; `read_file` says it in one line.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()  # pixels are read here, so that a torn file is noticed here
            image = opened
    mode = MODES[in_chans]
    return image if image.mode == mode else image.convert(mode)


def read_file(path: Path, in_chans: int = 3) -> Image.Image:
    """`read_image` of a file that a person named. Raises ValueError for one that isn't there, no image or torn."""
    try:
        return read_image(path, in_chans)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: give the path of an image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image of a known format; give a PNG, JPEG or the like") from None
    except Exception as error:  # a broken file can raise anything from within PIL's codecs
        raise ValueError(f"{path} can't be read as an image ({reason_of(error)}); give a whole one") from None


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong, without the memory addresses that PIL prints."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"<_io\.\S+( object at 0x[0-9a-f]+)?>", "its bytes", line)


def to_pixels(encoded: Any, in_chans: int, side: int) -> Tensor | None:
    """(C,S,S) uint8 of a JPEG's bytes whose sides are `side` already, else None; takes half as long as PIL."""
    if not isinstance(encoded, bytes) or encoded[:2] != JPEG:
        return None
    mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
    image = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)
    return image if image.shape[1:] == (side, side) else None


def to_uint8(image: Image.Image) -> Tensor:
    """(C,H,W) uint8 from a PIL image."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


class Fit:
    """The view without randomness, uint8 (C,S,S): resize to img_size / crop_pct, crop the centre."""

    def __init__(self, img_size: int, crop_pct: float, interpolation: str) -> None:
        self.resized, self.img_size = int(img_size / crop_pct), img_size
        resize = transforms.Resize(self.resized, interpolation=str_to_interp_mode(interpolation))
        self.view = transforms.Compose([resize, transforms.CenterCrop(img_size)])

    def __call__(self, image: Image.Image) -> Tensor:
        fits = image.size == (self.img_size, self.img_size) and self.resized == self.img_size
        return to_uint8(image if fits else self.view(image))

    def decoded(self, encoded: Any, in_chans: int) -> Tensor:
        """The same from an encoded image."""
        pixels = to_pixels(encoded, in_chans, self.img_size) if self.resized == self.img_size else None
        return self(read_image(encoded, in_chans)) if pixels is None else pixels


def statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The default mean and deviation per channel: ImageNet's for colour, 0.5 and 0.5 for grey."""
    return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)


class Normalise:
    """uint8 (..., C, H, W) to float32 (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        std_ = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.scale = 1 / (255 * std_)
        self.shift = -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / std_

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.to(torch.float32), self.scale)
