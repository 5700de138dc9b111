"""Boxes, masks and scores drawn on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from karat.detect.coco import Picture
from karat.detect.evaluate import MASK_THRESHOLD

# Okabe and Ito's colours, told apart by colour-blind eyes too; one a category, in turn
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
OPACITY = 0.45
BANNER = 24  # pixels above an image for its title


@dataclass(frozen=True)
class Shape:
    """What is drawn of one object: label from 1, box x1 y1 x2 y2, mask (height, width) of booleans, words."""

    label: int
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_]
    words: str


def found_shapes(output: dict[str, Tensor], names: Sequence[str], score: float) -> list[Shape]:
    """A detector's output for one image, scores of at least `score`, the surest last so that it lies on top."""
    kept = [i for i, value in enumerate(output["scores"].tolist()) if value >= score]
    shapes = []
    for i in reversed(kept):
        label = int(output["labels"][i])
        mask = (output["masks"][i, 0] > MASK_THRESHOLD).cpu().numpy()
        x1, y1, x2, y2 = output["boxes"][i].tolist()
        shapes.append(Shape(label, (x1, y1, x2, y2), mask, f"{names[label - 1]} {float(output['scores'][i]):.2f}"))
    return shapes


def true_shapes(picture: Picture, names: Sequence[str]) -> list[Shape]:
    """A picture's annotated objects; crowds are called so."""
    return [
        Shape(
            thing.label,
            thing.box,
            thing.mask(picture.size).astype(bool),
            names[thing.label - 1] + (" (crowd)" if thing.crowd else ""),
        )
        for thing in picture.things
    ]


def draw(image: Image.Image, shapes: Sequence[Shape]) -> Image.Image:
    """A copy of the image with masks, boxes and words."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    for shape in shapes:
        colour = np.array(COLOURS[(shape.label - 1) % len(COLOURS)], dtype=np.float32)
        pixels[shape.mask] = (1 - OPACITY) * pixels[shape.mask] + OPACITY * colour
    drawn = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(11, round(max(image.size) / 50)))
    for shape in shapes:
        colour_of = COLOURS[(shape.label - 1) % len(COLOURS)]
        x1, y1, x2, y2 = shape.box
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour_of, width=width)
        left, top, right, bottom = pen.textbbox((x1 + 2, y1 + 1), shape.words, font=font)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour_of)
        pen.text((x1 + 2, y1 + 1), shape.words, fill=(0, 0, 0), font=font)
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
