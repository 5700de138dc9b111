"""Images of a data set in batches, so many of them: what a conversion fits to and measures on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from karat.data.splits import Data


class Images:
    """Training images of one Data and evaluation images of another, in batches on a device."""

    def __init__(self, training: Data, evaluation: Data, device: torch.device) -> None:
        self.few, self.data, self.device, self.passes = training, evaluation, device, 0

    def training(self, count: int, *, fresh: bool = False) -> Iterator[Tensor]:
        """Batches of `count` training images; the same ones each time, or with `fresh` the next pass's."""
        return (images.to(self.device) for images, _ in self.labelled_training(count, fresh=fresh))

    def labelled_training(self, count: int, *, fresh: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with their labels."""
        self.passes += fresh
        self.few.train.set_epoch(self.passes if fresh else 0)
        given = 0
        while given < count:
            before = given
            for images, labels in self.few.train:
                keep = min(len(images), count - given)
                given += keep
                yield images[:keep], labels[:keep]
                if given >= count:
                    break
            if given == before:
                raise ValueError(f"{self.data.options.spec} gives no training images")
            if not fresh:  # fewer images than asked for: all of them, once
                return

    def labelled(self, most: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Evaluation batches, `most` images at most."""
        given = 0
        for images, labels in self.data.eval:
            keep = len(labels) if most is None else min(len(labels), most - given)
            if keep <= 0:
                return
            given += keep
            yield images[:keep], labels[:keep]

    def evaluation(self) -> Iterator[Tensor]:
        """Evaluation images."""
        return (images.to(self.device) for images, _ in self.data.eval)
