"""Batches of pictures with their objects, in the order and under the rules of the classification loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from karat.detect.coco import CocoPart
from karat.detect.views import View
from karat.train.data_augment import decode, keyed_randomness, mix
from karat.train.data_loader import Item, WorkerLoader, _reason
from karat.train.data_order import BadImages, Order

Sample = tuple[Tensor, dict[str, Tensor], str, str | None]
DetectBatch = tuple[list[Tensor], list[dict[str, Tensor]]]


class _Pictures(Dataset):
    """What a worker runs: decode and view. An index beyond the pictures begins again (`repeat`)."""

    def __init__(self, part: CocoPart, view: View, seed: int) -> None:
        self.part, self.view, self.seed = part, view, seed

    def __getitem__(self, item: Item) -> Sample:
        epoch, position, index = item
        picture = self.part.pictures[int(index) % len(self.part)]  # type: ignore[arg-type]
        try:
            with keyed_randomness(mix(self.seed, epoch, position)):
                return *self.view(decode(picture.path, 3), picture), str(picture.path), None
        except Exception as error:  # a broken file can raise anything from within PIL's codecs
            return torch.zeros(3, 1, 1), {}, str(picture.path), _reason(error)


def _collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[int, str, str]]]:
    images, targets, names, reasons = zip(*samples, strict=True)
    bad = [(row, names[row], reason) for row, reason in enumerate(reasons) if reason is not None]
    return list(images), list(targets), bad


class PictureLoader(WorkerLoader):
    """Batches of images (3,h,w), of their own sizes, and targets (see `View`); otherwise as WorkerLoader."""

    collate = staticmethod(_collate)

    def __init__(self, part: CocoPart, view: View, order: Order, bad: BadImages, title: str, workers: int) -> None:
        super().__init__(
            order, bad, len(part.categories), title, part, view, in_chans=3, img_size=0, workers=workers  # type: ignore[arg-type]
        )  # fmt: skip
        self.views = _Pictures(part, view, order.seed)

    def _check(self, labels: Any, bad: Sequence[tuple[int, str, str]]) -> None:
        for _, name, reason in bad:
            self.bad.report(name, reason)

    def _without(self, images: Any, labels: Any, rows: list[int]) -> Any:
        """As WorkerLoader has it: in training good images of the same batch take the bad ones' places."""
        good = [row for row in range(len(images)) if row not in set(rows)]
        if self.order.train:
            if not good:
                raise ValueError(f"{self.title}: not one image of a batch of {len(images)} can be decoded")
            good = [good[row % len(good)] for row in range(len(images))]
        return [images[row] for row in good], [labels[row] for row in good]
