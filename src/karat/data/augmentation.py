"""What happens to an image between its pixels and the model: which views there are, and how they are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from karat.data.images import Fit, Normalise, middle, statistics
from karat.data.randomness import uniforms
from karat.values import Count, Low2High, Natural, OneOf, Positive, Probability, Share, Strength, check

Transform = Callable[[Image.Image], Tensor]

CROP_MODES = ("rrc", "rkrc", "rkrr", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
ERASE_MODES = ("const", "rand", "pixel")


@dataclass(frozen=True)
class Augmentation:
    """How images are seen in training and in evaluation, under timm's names.

    `train_crop_mode` is timm's ("rrc": random resized crop by `scale` and `ratio`, "rkrc", "rkrr") or "pad" (the image
    shifted by up to an eighth of its side over a zero border, the habit for small images). As in timm, `color_jitter`
    acts only where `aa` is None. Raises ValueError for a value outside its range.
    """

    # crop and flip
    train_crop_mode: Annotated[str, OneOf(CROP_MODES)] = "rrc"
    """rrc, rkrc, rkrr, or pad: shifted over a border."""
    scale: Annotated[tuple[Share, Share], Low2High] = (0.08, 1.0)
    """Range of a random crop's share of the area."""
    ratio: Annotated[tuple[Positive, Positive], Low2High] = (0.67, 1.5)
    """Range of a random crop's aspect ratio."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    train_interpolation: Annotated[str, OneOf((*INTERPOLATIONS, "random"))] = "bicubic"
    """Interpolation of training images: nearest, bilinear, bicubic, box, hamming, lanczos, or random (one of two)."""
    interpolation: Annotated[str, OneOf(INTERPOLATIONS)] = "bicubic"
    """Interpolation of evaluation images, one of the same but random."""
    crop_pct: Share = 0.9
    """Share of the side that the evaluation's centre crop keeps."""
    # colour and erasing
    color_jitter: Strength = 0.4
    """Strength of colour jitter, where aa is none."""
    aa: str | None = None
    """timm's spec of RandAugment or AutoAugment; none: neither."""
    reprob: Probability = 0.0
    """Probability of random erasing."""
    remode: Annotated[str, OneOf(ERASE_MODES)] = "pixel"
    """What is written over an erased part: const, rand or pixel."""
    recount: Count = 1
    """Number of erased parts."""
    aug_repeats: Natural = 0
    """Repeats of an image in an epoch (repeated augmentation); 0: none."""

    def __post_init__(self) -> None:
        check(self)
        if self.aa is not None:
            _check_auto_augment(self.aa)

    @property
    def is_batched(self) -> bool:
        """Whether training images are only shifted and mirrored, which `pad_crop_flip` does to a whole batch."""
        changed = self.aa is not None or self.color_jitter or self.reprob or self.train_interpolation == "random"
        return self.train_crop_mode == "pad" and not changed


_MSTD = r"mstd\d+(\.\d+)?"
_POLICIES: dict[str, tuple[Callable[[str], Any], str]] = {
    "rand": (rand_augment_transform, rf"[mn]\d+|mmax\d+|inc[01]|p(0(\.\d+)?|1(\.0+)?)|t(weights|3aw?)|{_MSTD}"),
    "augm": (augment_and_mix_transform, rf"[mwd]\d+|b[01]|a\d+(\.\d+)?|{_MSTD}"),
}


def _check_auto_augment(spec: str) -> None:
    """ValueError where timm can't read a spec of RandAugment, AugMix or AutoAugment."""
    # by the first letters, as timm's create_transform tells them; timm passes over a section without a number
    make, section = _POLICIES.get(spec[:4], (auto_augment_transform, _MSTD))
    try:
        wrong = next((one for one in spec.split("-")[1:] if not re.fullmatch(section, one)), None)
        if wrong is not None:
            raise ValueError(f"timm knows no section {wrong!r}")
        make(spec)
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
            middle,
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
    if grey:  # timm's colour operations fill with a colour: a grey image goes through as three equal channels
        return transforms.Compose([transforms.Grayscale(3), *before, view, _first_channel])
    return transforms.Compose([*before, view])


def _resize(img_size: int, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """The shorter side to img_size; "random" is bilinear or bicubic, as in timm's random crop."""
    names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    ways = [transforms.Resize(img_size, interpolation=str_to_interp_mode(name)) for name in names]
    return transforms.RandomChoice(ways) if len(ways) > 1 else ways[0]


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
