"""From a picture and its objects to what the detector trains on: one size, random scale, crop and flip."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from karat.data.images import to_uint8
from karat.detect.coco import Picture
from karat.detect.recipes import DetectRecipe


class View:
    """An image and its objects in S×S pixels or less, as the recipe says; random ones draw from python's `random`.

    Gives (image, target): image (3,h,w) float32 in [0, 1]; target a dict of image_id, size (2,) of the file's height
    and width, and for training boxes (n,4), labels (n,) and masks (n,h,w) uint8 of the objects that are no crowds and
    still visible.
    """

    def __init__(self, recipe: DetectRecipe, train: bool) -> None:
        self.recipe, self.train = recipe, train

    def __call__(self, image: Image.Image, picture: Picture) -> tuple[Tensor, dict[str, Tensor]]:
        side, recipe = self.recipe.img_size, self.recipe
        height, width = picture.size
        if image.size != (width, height):
            turned = "; exchange them, or annotate it as its EXIF orientation shows it"
            turned = turned if image.size == (height, width) else ""
            raise ValueError(f"it has {image.height}x{image.width} pixels, its JSON says {height}x{width}{turned}")
        new = self._new_size(height, width)
        scaled = image.resize((new[1], new[0]), Image.Resampling.BILINEAR)
        top, left = (random.randint(0, max(length - side, 0)) for length in new) if self.train else (0, 0)
        flip = self.train and random.random() < recipe.hflip
        bottom, right = min(new[0], top + side), min(new[1], left + side)
        pixels = to_uint8(scaled)[:, top:bottom, left:right].float().div(255)
        target = {"image_id": torch.tensor(picture.id), "size": torch.tensor(picture.size)}
        if self.train:
            target |= self._objects(picture, new, (top, left, bottom, right), flip)
        return (pixels.flip(-1) if flip else pixels).contiguous(), target

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which the image is scaled, before a crop."""
        side = self.recipe.img_size
        if self.recipe.view == "stretch":
            return side, side
        factor = side / max(height, width) * (random.uniform(*self.recipe.jitter) if self.train else 1.0)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _objects(
        self, picture: Picture, new: tuple[int, int], crop: tuple[int, int, int, int], flip: bool
    ) -> dict[str, Tensor]:
        top, left, bottom, right = crop
        scale = new[1] / picture.size[1], new[0] / picture.size[0]  # x, y
        boxes, labels, masks = [], [], []
        for thing in picture.things:
            box = np.array(thing.box) * (*scale, *scale) - (left, top, left, top)
            box = box.clip(0, (right - left, bottom - top) * 2)
            if thing.crowd or box[2] - box[0] < 1 or box[3] - box[1] < 1:
                continue
            mask = thing.mask(new, scale)[top:bottom, left:right]
            if not mask.any():
                continue
            if flip:
                box = np.array([right - left - box[2], box[1], right - left - box[0], box[3]])
                mask = mask[:, ::-1]
            boxes.append(box)
            labels.append(thing.label)
            masks.append(np.ascontiguousarray(mask))
        shape = (bottom - top, right - left)
        return {
            "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, *shape)),
        }
