"""What happens to an image between its file and the model, and where its randomness comes from.

Every random choice is a function of (seed, epoch, position in the epoch): the same image gets the same
augmentation however many worker processes or machines there are, and whether or not the run was
interrupted.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

from karat.runs.recipes import Recipe

Transform = Callable[[Image.Image], Tensor]
MASK = 2**64 - 1
JPEG = b"\xff\xd8"  # how a JPEG file begins


def mix(*keys: int) -> int:
    """One 64-bit number from several: splitmix64's finaliser (Steele et al. 2014), folded over the keys."""
    state = 0
    for key in keys:
        state = (state + (key & MASK) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def uniforms(key: int, positions: Sequence[int], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), shape (len(positions), draws), each a function of (key, position, draw) alone."""
    counter = np.asarray(positions, dtype=np.uint64)[:, None] * np.uint64(draws) + np.arange(draws, dtype=np.uint64)
    state: Any = np.uint64(key) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextlib.contextmanager
def keyed_randomness(key: int) -> Iterator[None]:
    """Seed python, numpy and torch (CPU) from `key`: timm's and torchvision's transforms draw from all three.

    In the main process the three states are put back afterwards, so that loading never disturbs the
    model's own randomness (dropout, drop path); a worker process has no other use for them.
    """
    in_worker = get_worker_info() is not None
    if not in_worker:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  the state that transforms draw from
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002  as above
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        if not in_worker:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002  as above
            torch.set_rng_state(before[2])


def statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The default mean and deviation per channel: ImageNet's for colour, 0.5 and 0.5 for grey."""
    return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)


def decode(encoded: Any, in_chans: int) -> Image.Image:
    """A PIL image in colour (in_chans 3) or grey (1), from bytes, a path, an array (H,W[,3]) or an image."""
    mode = _MODES[in_chans]
    if isinstance(encoded, np.ndarray):
        image = Image.fromarray(encoded)
    elif isinstance(encoded, Image.Image):
        image = encoded
    else:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as opened:
            opened.load()  # pixels are read here, so that a torn file is noticed here
            image = opened
    return image if image.mode == mode else image.convert(mode)


_MODES = {1: "L", 3: "RGB"}


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
        """The same from an encoded image. A JPEG of the right size skips PIL, which takes twice as long."""
        if isinstance(encoded, bytes) and self.resized == self.img_size and encoded[:2] == JPEG:
            mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
            image = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)
            if image.shape[1:] == (self.img_size, self.img_size):
                return image
        return self(decode(encoded, in_chans))


class Normalise:
    """uint8 (..., C, H, W) to float32 (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        std_ = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.scale = 1 / (255 * std_)
        self.shift = -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / std_

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.to(torch.float32), self.scale)


def eval_transform(recipe: Recipe, img_size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The evaluation view of one image: fit_transform by the recipe's crop_pct, normalised."""
    fit = Fit(img_size, recipe.crop_pct, recipe.interpolation)
    return transforms.Compose([fit, Normalise(mean, std)])


def train_transform(
    recipe: Recipe, img_size: int, mean: Sequence[float], std: Sequence[float], *, mirror: bool = True
) -> Transform:
    """The training view of one image by the recipe: timm's create_transform, and mode "pad" on top of it.

    mirror=False leaves the horizontal flip out (digits: a mirrored 2 is no 2).
    """
    grey = len(mean) == 1
    hflip = recipe.hflip if mirror else 0.0
    mode = recipe.train_crop_mode
    if mode == "pad":
        before = [
            _resize(img_size, recipe.train_interpolation),
            transforms.CenterCrop(img_size),
            transforms.RandomCrop(img_size, padding=img_size // 8),
        ]
        # a random resized crop of the whole square image is the identity, so what follows is timm's as usual
        crop: dict[str, Any] = {"train_crop_mode": "rrc", "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    else:
        before = []
        crop = {"train_crop_mode": mode, "scale": recipe.scale, "ratio": recipe.ratio}
    view = create_transform(
        img_size,
        is_training=True,
        **crop,
        hflip=hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.aa,
        interpolation=recipe.train_interpolation,
        mean=tuple(mean) * (3 if grey else 1),
        std=tuple(std) * (3 if grey else 1),
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
    )
    _mend_posterize(view)
    if grey:  # timm's colour operations fill with a colour: a grey image goes through as three equal channels
        return transforms.Compose([transforms.Grayscale(3), *before, view, _first_channel])
    return transforms.Compose([*before, view])


def _resize(img_size: int, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """The shorter side to img_size; "random" is bilinear or bicubic, as in timm's random crop."""
    names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    ways = [transforms.Resize(img_size, interpolation=str_to_interp_mode(name)) for name in names]
    return transforms.RandomChoice(ways) if len(ways) > 1 else ways[0]


def _mend_posterize(view: transforms.Compose) -> None:
    """Let RandAugment's posterize keep 0 bits, a black image, as it could before Pillow refused that.

    The published rand-m15-n2-mstd1.0-inc1 comes to 0 bits at magnitude 10, which m15 nearly always is.
    """
    for step in view.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.aug_fn is timm_posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)


def _first_channel(image: Tensor) -> Tensor:
    return image[:1]


def is_batched(recipe: Recipe) -> bool:
    """Whether the recipe only shifts and mirrors, which `pad_crop_flip` does to a whole batch."""
    changed = recipe.aa is not None or recipe.color_jitter or recipe.reprob or recipe.train_interpolation == "random"
    return recipe.train_crop_mode == "pad" and not changed


def pad_crop_flip(images: Tensor, key: int, positions: Sequence[int], hflip: float) -> Tensor:
    """Shift each image by up to S // 8 pixels over a zero border and mirror it with probability hflip.

    images (B,C,S,S) uint8 -> the same shape; one gather for the whole batch.
    """
    batch, channels, size, _ = images.shape
    pad = size // 8
    draws = torch.from_numpy(uniforms(key, positions, 3))
    top, left = (draws[:, :2] * (2 * pad + 1)).long().unbind(1)
    span = torch.arange(size)
    rows = top[:, None] + span  # (B,S)
    columns = left[:, None] + torch.where(draws[:, 2:] < hflip, size - 1 - span, span)  # (B,S)
    wide = size + 2 * pad
    flat = (rows[:, :, None] * wide + columns[:, None, :]).view(batch, 1, -1)  # (B,1,S*S)
    padded = F.pad(images, (pad, pad, pad, pad)).view(batch, channels, -1)
    return padded.gather(2, flat.expand(-1, channels, -1)).view_as(images)
