"""Boxes, masks and scores drawn on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from karat.detect.coco import Picture
from karat.detect.evaluate import MASK_THRESHOLD
from karat.plots import COLOURS, one_font

OPACITY = 0.45
BANNER = 24  # pixels above an image for its title


@dataclass(frozen=True)
class DrawnObject:
    """What is drawn of one object: label from 1, box x1 y1 x2 y2 (4,), mask (height, width) of booleans, words."""

    label: int
    box: Tensor
    mask: Tensor
    words: str

    @property
    def colour(self) -> str:
        """That of its category."""
        return COLOURS[(self.label - 1) % 6]  # black and grey are for lines alone


def found_objects(output: dict[str, Tensor], names: Sequence[str], score: float) -> list[DrawnObject]:
    """A detector's output for one image, scores of at least `score`, the surest last so that it lies on top."""
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    masks = (output["masks"][:, 0] > MASK_THRESHOLD).cpu()
    return [
        DrawnObject(labels[i], output["boxes"][i].cpu(), masks[i], f"{names[labels[i] - 1]} {scores[i]:.2f}")
        for i in reversed(range(len(scores)))
        if scores[i] >= score
    ]


def true_objects(picture: Picture, names: Sequence[str]) -> list[DrawnObject]:
    """A picture's annotated objects; crowds are called so."""
    return [
        DrawnObject(
            thing.label,
            torch.tensor(thing.box),
            torch.from_numpy(thing.mask(picture.size)).bool(),
            names[thing.label - 1] + (" (crowd)" if thing.crowd else ""),
        )
        for thing in picture.things
    ]


def draw(image: Image.Image, objects: Sequence[DrawnObject]) -> Image.Image:
    """A copy of the image with masks, boxes and words."""
    pixels = pil_to_tensor(image.convert("RGB"))
    for one in objects:  # one at a time: torchvision paints black where several overlap
        pixels = draw_segmentation_masks(pixels, one.mask, OPACITY, one.colour)
    written = [(one, *one_font(one.words)) for one in objects]
    for font, some in groupby(written, key=lambda each: each[1]):  # torchvision takes one font a call
        ones, _, words = zip(*some, strict=True)
        pixels = draw_bounding_boxes(
            pixels,
            torch.stack([one.box for one in ones]),
            list(words),
            [one.colour for one in ones],
            width=max(2, round(max(image.size) / 400)),
            font=font,
            font_size=max(11, round(max(image.size) / 50)),
            fill_labels=True,
        )
    drawn: Image.Image = to_pil_image(pixels)
    return drawn


def beside(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Images of one height side by side, each under its title."""
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (sum(image.width for image in images), height + BANNER), (255, 255, 255))
    pen, x = ImageDraw.Draw(sheet), 0
    for image, title in zip(images, titles, strict=True):
        pen.text((x + 6, 4), title, fill=(0, 0, 0), font=ImageFont.load_default(size=15))
        sheet.paste(image, (x, BANNER))
        x += image.width
    return sheet
