"""What happens to an image between its pixels and the model: which views there are, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from karat.data.images import Fit, Normalise, statistics
from karat.data.randomness import uniforms
from karat.errors import require

Transform = Callable[[Image.Image], Tensor]

CROP_MODES = ("rrc", "rkrc", "rkrr", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
ERASE_MODES = ("const", "rand", "pixel")
_CHOICES = {
    "train_crop_mode": CROP_MODES,
    "train_interpolation": (*INTERPOLATIONS, "random"),
    "interpolation": INTERPOLATIONS,
    "remode": ERASE_MODES,
}


@dataclass(frozen=True)
class Augmentation:
    """How images are seen in training and in evaluation, under timm's names.

    `train_crop_mode` is timm's ("rrc": random resized crop by `scale` and `ratio`, "rkrc", "rkrr") or "pad" (the image
    shifted by up to an eighth of its side over a zero border, the habit for small images). As in timm, `color_jitter`
    acts only where `aa` is None. Raises ValueError for a value outside its range.
    """

    # crop and flip
    train_crop_mode: str = "rrc"
    """rrc, rkrc, rkrr, or pad: shifted over a border."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a random crop's share of the area."""
    ratio: tuple[float, float] = (0.67, 1.5)
    """Range of a random crop's aspect ratio."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    train_interpolation: str = "bicubic"
    """Interpolation of training images: nearest, bilinear, bicubic, box, hamming, lanczos, or random (one of two)."""
    interpolation: str = "bicubic"
    """Interpolation of evaluation images, one of the same but random."""
    crop_pct: float = 0.9
    """Share of the side that the evaluation's centre crop keeps."""
    # colour and erasing
    color_jitter: float = 0.4
    """Strength of colour jitter, where aa is none."""
    aa: str | None = None
    """timm's spec of RandAugment or AutoAugment; none: neither."""
    reprob: float = 0.0
    """Probability of random erasing."""
    remode: str = "pixel"
    """What is written over an erased part: const, rand or pixel."""
    recount: int = 1
    """Number of erased parts."""
    aug_repeats: int = 0
    """Repeats of an image in an epoch (repeated augmentation); 0: none."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):  # lists arrive from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("hflip", "reprob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability lies in [0, 1]")
        for name in ("color_jitter", "aug_repeats"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            ordered = len(value) == 2 and 0 < value[0] <= value[1]
            require(ordered, name, value, "give (low, high), 0 < low <= high")
        require(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "give a value in (0, 1]")
        require(self.scale[1] <= 1, "scale", self.scale, "a crop's area is at most 1")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, name, value, f"one of {', '.join(choices)}")
        if self.aa is not None:
            _check_auto_augment(self.aa)

    @property
    def is_batched(self) -> bool:
        """Whether training images are only shifted and mirrored, which `pad_crop_flip` does to a whole batch."""
        changed = self.aa is not None or self.color_jitter or self.reprob or self.train_interpolation == "random"
        return self.train_crop_mode == "pad" and not changed


def _check_auto_augment(spec: str) -> None:
    """ValueError where timm can't read a spec of RandAugment, AugMix or AutoAugment."""
    kinds = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}  # as timm's create_transform tells them
    try:
        kinds.get(spec[:4], auto_augment_transform)(spec)
    except (AssertionError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or ["timm knows no such"])[0]
        raise ValueError(f"recipe: aa={spec!r}: {reason}; e.g. rand-m9-mstd0.5-inc1, augmix-m3-w3 or v0") from None


def eval_transform(augmentation: Augmentation, img_size: int, in_chans: int) -> Transform:
    """The evaluation view of one image: `Fit` by crop_pct, normalised."""
    fit = Fit(img_size, augmentation.crop_pct, augmentation.interpolation)
    return transforms.Compose([fit, Normalise(*statistics(in_chans))])


def train_transform(augmentation: Augmentation, img_size: int, in_chans: int, *, mirror: bool = True) -> Transform:
    """The training view of one image: timm's create_transform, and mode "pad" on top of it.

    mirror=False leaves the horizontal flip out (digits: a mirrored 2 is no 2).
    """
    grey = in_chans == 1
    mean, std = statistics(in_chans)
    hflip = augmentation.hflip if mirror else 0.0
    mode = augmentation.train_crop_mode
    if mode == "pad":
        before = [
            _resize(img_size, augmentation.train_interpolation),
            transforms.CenterCrop(img_size),
            transforms.RandomCrop(img_size, padding=img_size // 8),
        ]
        # a random resized crop of the whole square image is the identity, so what follows is timm's as usual
        crop: dict[str, Any] = {"train_crop_mode": "rrc", "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    else:
        before = []
        crop = {"train_crop_mode": mode, "scale": augmentation.scale, "ratio": augmentation.ratio}
    view = create_transform(
        img_size,
        is_training=True,
        **crop,
        hflip=hflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.aa,
        interpolation=augmentation.train_interpolation,
        mean=mean * (3 if grey else 1),
        std=std * (3 if grey else 1),
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
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
