"""Batches of pictures with their objects, in the order and under the rules of the classification loader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from karat.data.images import read_image, reason_of
from karat.data.loader import WorkerLoader
from karat.data.order import BadImages, ImageOrder
from karat.data.randomness import keyed_randomness, mix
from karat.detect.coco import CocoPart
from karat.detect.views import View

Sample = tuple[Tensor, dict[str, Tensor], list[tuple[str, str]]]  # image, target, unreadable files with the reason


class _Pictures(Dataset):
    """What a worker runs: decode and view. An index beyond the pictures begins again (`repeat`).

    In training the next picture takes the place of one that can't be decoded, so that batches stay whole.
    """

    def __init__(self, part: CocoPart, view: View, seed: int) -> None:
        self.part, self.view, self.seed = part, view, seed

    def __getitem__(self, item: tuple[int, int, int]) -> Sample:
        epoch, position, index = item
        bad: list[tuple[str, str]] = []
        for step in range(len(self.part) if self.view.train else 1):
            picture = self.part.pictures[(index + step) % len(self.part)]
            try:
                with keyed_randomness(mix(self.seed, epoch, position)):
                    return *self.view(read_image(picture.path), picture), bad
            except Exception as error:  # a broken file can raise anything from within PIL's codecs
                bad.append((str(picture.path), reason_of(error)))
        return torch.zeros(3, 1, 1), {}, bad


def _collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[int, str, str]]]:
    images, targets, reports = zip(*samples, strict=True)
    bad = [(row, *report) for row, found in enumerate(reports) for report in found]
    return list(images), list(targets), bad


class PictureLoader(WorkerLoader):
    """Batches of images (3,h,w), of their own sizes, and targets (see `View`); otherwise as WorkerLoader."""

    collate = staticmethod(_collate)

    def __init__(self, part: CocoPart, view: View, order: ImageOrder, bad: BadImages, title: str, workers: int) -> None:
        pictures = _Pictures(part, view, order.seed)
        super().__init__(order, bad, len(part.categories), title, pictures, workers=workers)
        self._side = view.recipe.img_size

    def padding(self) -> Any:
        """As Loader.padding; its target names no image."""
        return [torch.zeros(3, self._side, self._side)], [{"size": torch.tensor((self._side, self._side))}]

    def _checked(self, images: Any, labels: Any, bad: list[tuple[int, str, str]]) -> Any:
        """The batch with its bad images reported and out of the way."""
        for _, name, reason in bad:
            self.bad.report(name, reason)
        good = [row for row, target in enumerate(labels) if target]
        if self.order.train and not good:
            raise ValueError(f"{self.title}: not one of the training images can be decoded")
        return [images[row] for row in good], [labels[row] for row in good]
