"""One image, from its file or bytes to the pixels that a model takes, without randomness.

Every image of the package comes through `read_image`, which makes of each of Pillow's modes what a person sees, or
refuses it; docs/data.md has the table.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

MODES = {1: "L", 3: "RGB"}
LONGEST = 16  # sides of a square that are kept of a longer image
JPEG = b"\xff\xd8"  # how a JPEG file begins
TURNS = {  # EXIF orientation -> what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Whose numbers beyond 8 bits have a known white; None: an array.
DEEP_FORMATS = ("PNG", "PPM", "TIFF", "JPEG2000", None)


def read_image(source: Any, in_chans: int = 3, *, ground: str = "white") -> Image.Image:
    """A PIL image in colour (in_chans 3) or grey (1), from a path, bytes, an array (H,W[,3]) or an image.

    ground: what lies under transparent parts. Raises ValueError for numbers whose white isn't known, and whatever PIL
    does where there is no whole image; `read_file` says it in one line.
    """
    if isinstance(source, bytes) and not source:
        raise ValueError("there is no image, or an empty one")
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
        image.load()  # a TIFF is turned by this
    else:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()  # pixels are read here, so that a torn file is noticed here
            image = opened
    turn = TURNS.get(_orientation(image))
    seen = _colours(image, ground)
    seen = seen if turn is None else seen.transpose(turn)
    mode = MODES[in_chans]
    return seen if seen.mode == mode else seen.convert(mode)


def _orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where there is none or the block is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever a broken block makes Pillow raise; the pixels are whole
        return 1


def _colours(image: Image.Image, ground: str) -> Image.Image:
    """The image in mode L or RGB."""
    if 2 in getattr(image, "tag_v2", {}).get(SAMPLEFORMAT, ()):  # a sign, which Pillow reads as brightness
        raise ValueError(
            "its pixels are numbers with a sign, which don't say what is white; save it with 8 or 16 bits and none"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), seen).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey beyond 8 bits as 8: TIFF says how many there are, and whether 0 is white; the others have 16."""
    tags = getattr(image, "tag_v2", {})
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not known or image.format not in DEEP_FORMATS:
        numbers = "real numbers" if image.mode == "F" else "whole numbers of more than 16 bits"
        raise ValueError(f"its pixels are {numbers}, which don't say what is white; save it with 8 or 16 bits")
    white = 2 ** int(tags.get(BITSPERSAMPLE, (16,))[0]) - 1
    values = np.rint(np.asarray(image).astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else values)


def _from_lab(image: Image.Image) -> Image.Image:
    """CIELAB (D50) to sRGB."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    seen = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert seen is not None, "not in place"
    return seen


def read_file(path: Path, in_chans: int = 3, *, ground: str = "white") -> Image.Image:
    """`read_image` of a file that a person named. Raises ValueError for one that isn't there, no image or torn."""
    try:
        return read_image(path, in_chans, ground=ground)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: give the path of an image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image of a known format; give a PNG, JPEG or the like") from None
    except Exception as error:  # a broken file can raise anything from within PIL's codecs
        raise ValueError(f"{path} can't be read as an image: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong, without the memory addresses that PIL prints."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"<_io\.\S+( object at 0x[0-9a-f]+)?>", "its bytes", line)


def to_pixels(encoded: Any, in_chans: int, side: int) -> Tensor | None:
    """(C,S,S) uint8 of an upright JPEG's bytes whose sides are `side` already, else None; sooner than PIL's."""
    if not isinstance(encoded, bytes) or encoded[:2] != JPEG:
        return None
    with Image.open(io.BytesIO(encoded)) as header:  # no pixels are read
        if header.size != (side, side) or header.mode not in MODES.values() or _orientation(header) in TURNS:
            return None
    mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
    return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)


def to_uint8(image: Image.Image) -> Tensor:
    """(C,H,W) uint8 from a PIL image."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def middle(image: Image.Image) -> Image.Image:
    """The middle of a very long image, more than a square of which is never seen: scaled whole it can fill a memory."""
    width, height = image.size
    over = [max(0, side - LONGEST * min(width, height)) // 2 for side in (width, height)]
    return image.crop((over[0], over[1], width - over[0], height - over[1])) if any(over) else image


class Fit:
    """The view without randomness, uint8 (C,S,S): resize to img_size / crop_pct, crop the centre."""

    def __init__(self, img_size: int, crop_pct: float, interpolation: str) -> None:
        self.resized, self.img_size = int(img_size / crop_pct), img_size
        resize = transforms.Resize(self.resized, interpolation=str_to_interp_mode(interpolation))
        self.view = transforms.Compose([resize, transforms.CenterCrop(img_size)])

    def __call__(self, image: Image.Image) -> Tensor:
        fits = image.size == (self.img_size, self.img_size) and self.resized == self.img_size
        return to_uint8(image if fits else self.view(middle(image)))

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
