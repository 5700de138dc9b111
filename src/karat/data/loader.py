"""Batches of images, decoded in memory or one by one, exactly resumable: `data_order` says which images and when.

Augmentation draws from (seed, epoch, position), so a loader started at batch k gives what an uninterrupted one would
have given.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from karat.data.augmentation import Transform, pad_crop_flip
from karat.data.images import Fit, Normalise, read_image, reason_of
from karat.data.order import BadImages, ImageOrder
from karat.data.randomness import keyed_randomness, mix
from karat.data.sources import Record, Source, Stream, raise_label

Batch = tuple[Tensor, Tensor]  # images (B,C,S,S) float32, labels (B,) int64
Item = tuple[int, int, int | Record]  # epoch, position in it, and the sample's index or itself
UNREADABLE = -1  # stands in the place of a label where there is no image to count
CHUNK = 64  # images that one thread decodes at a time: fewer, and handing them over costs more than decoding


class Views(Dataset):
    """What a worker process runs: decode and transform. Items are (epoch, position, index or record).

    source: what an index refers to; None where the items are records.
    """

    def __init__(self, source: Source | None, transform: Transform, in_chans: int, size: int, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.blank = torch.zeros(in_chans, size, size)

    def __getitem__(self, item: Item) -> tuple[Tensor, int, str, str | None]:
        epoch, position, which = item
        if isinstance(which, Record):
            record = which
        else:
            assert self.source is not None
            record = self.source[which]
        try:
            image = read_image(record.image, len(self.blank))
        except Exception as error:  # a broken file can raise anything from within PIL's codecs
            return self.blank, UNREADABLE, record.name, reason_of(error)
        with keyed_randomness(mix(self.seed, epoch, position)):
            return self.transform(image), record.label, record.name, None


def _collate(
    samples: list[tuple[Tensor, int, str, str | None]],
) -> tuple[Tensor, Tensor, list[tuple[int, str, str]]]:
    images, labels, names, reasons = zip(*samples, strict=True)
    bad = [(row, names[row], reason) for row, reason in enumerate(reasons) if reason is not None]
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64), bad


class Loader(ABC):
    """Batches of one split. Iterable; `len` is the number of batches an epoch, on every process the same.

    In evaluation a process that has fewer than another fills up with `padding`: a forward pass may take them all.
    """

    def __init__(self, order: ImageOrder, bad: BadImages, num_classes: int, title: str) -> None:
        self.order, self.bad, self.num_classes, self.title = order, bad, num_classes, title
        self.epoch = 0

    @property
    def batch_size(self) -> int:
        """Images in a batch of this process (fewer than asked for where the data is smaller)."""
        return self.order.batch_size

    @property
    def num_samples(self) -> int:
        """Samples an epoch over all processes; for training without those that fill no batch."""
        order = self.order
        return order.batches * order.batch_size * order.world_size if order.train else order.n

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; order and augmentation follow from it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.most_batches

    def __iter__(self) -> Iterator[Batch]:
        given = 0
        for batch in self.iter_from(0):
            given += 1
            yield batch
        if not self.order.train and self.order.world_size > 1:
            yield from repeat(self.padding(), self.order.most_batches - given)

    @abstractmethod
    def padding(self) -> Batch:
        """A batch of one blank image that counts for nothing."""

    @abstractmethod
    def iter_from(self, batch_index: int) -> Iterator[Batch]:
        """The batches of this epoch from `batch_index` on, the same as if those before had been taken."""


class ResidentLoader(Loader):
    """All images decoded in memory, uint8 (n,C,S,S); augmentation acts on whole batches, in this process."""

    def __init__(
        self,
        order: ImageOrder,
        bad: BadImages,
        num_classes: int,
        title: str,
        images: Tensor,
        labels: Tensor,
        normalise: Normalise,
        hflip: float,
    ) -> None:
        super().__init__(order, bad, num_classes, title)
        self.images, self.labels, self.normalise, self.hflip = images, labels, normalise, hflip

    def padding(self) -> Batch:
        return torch.zeros(1, *self.images.shape[1:]), torch.tensor([UNREADABLE])

    def iter_from(self, batch_index: int) -> Iterator[Batch]:
        epoch, order = self.epoch, self.order
        permutation, key = order.permutation(epoch), mix(order.seed, epoch, 1)
        for batch in range(batch_index, order.batches):
            positions = order.positions(batch)
            chosen = permutation[positions.start : positions.stop : positions.step]
            images = self.images[chosen]
            if order.train:
                images = pad_crop_flip(images, key, positions, self.hflip)
            yield self.normalise(images), self.labels[chosen]


def _apart(worker: int) -> None:
    """A worker leaves its process's group: a signal to all of it, as torchrun's are, is the main process's to obey."""
    if hasattr(os, "setpgrp"):  # Windows has no such groups
        os.setpgrp()


class _Feed:
    """The batch sampler of torch's loader: hands on the items that it was given.

    It must not refer back to the loader: in a cycle the workers' queues go before the workers are told to stop, and
    each then costs torch five seconds of waiting.
    """

    def __init__(self, batches: int) -> None:
        self.items: Iterator[list[Item]] = iter(())
        self.batches = batches

    def __iter__(self) -> Iterator[list[Item]]:
        return self.items

    def __len__(self) -> int:
        return self.batches


class WorkerLoader(Loader):
    """Images decoded and transformed one by one, by torch's worker processes (or none).

    The order is decided here and sent to the workers item by item; a stream is read here too and its
    encoded images are sent, so that neither order nor sharding depends on how many workers there are.
    views: what a worker runs, given an item.
    """

    collate: Callable[[list[Any]], tuple[Any, Any, list[tuple[int, str, str]]]] = staticmethod(_collate)

    def __init__(
        self,
        order: ImageOrder,
        bad: BadImages,
        num_classes: int,
        title: str,
        views: Dataset[Any],
        *,
        stream: Stream | None = None,
        workers: int,
    ) -> None:
        super().__init__(order, bad, num_classes, title)
        self.views, self.stream, self.workers = views, stream, workers
        self._feed = _Feed(order.batches)
        self._torch_loader: DataLoader | None = None

    def padding(self) -> Batch:
        assert isinstance(self.views, Views)
        return self.views.blank[None], torch.tensor([UNREADABLE])

    def _open(self) -> DataLoader:
        """Torch's loader, with its workers for as long as nothing fails."""
        if self._torch_loader is None:
            self._torch_loader = DataLoader(
                self.views,
                batch_sampler=self._feed,
                num_workers=self.workers,
                collate_fn=self.collate,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=self.workers > 0,
                worker_init_fn=_apart,
                # worker seeds are never used; a generator of its own keeps torch's global state untouched
                generator=torch.Generator().manual_seed(0),
            )
        return self._torch_loader

    def iter_from(self, batch_index: int) -> Iterator[Batch]:
        """As Loader.iter_from; a stream reads past the images before, without decoding them."""
        items = self._stream_items if self.stream else self._map_items
        self._feed.items = items(self.epoch, batch_index)
        batches: Iterator[tuple[Tensor, Tensor, list[tuple[int, str, str]]]] | None = iter(self._open())
        try:
            while True:
                assert batches is not None
                batch = next(batches, None)
                if batch is None:
                    return
                images, labels = self._checked(*batch)
                if len(labels):
                    yield images, labels
        except Exception as error:
            # the workers end here and now, not when the traceback that refers to them is collected
            batches = self._torch_loader = None
            if not (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)):
                raise
            raise RuntimeError(
                f"{self.title}: a data worker died ({str(error).splitlines()[0]}); what was saved is safe. "
                "Most often memory ran out: lower --workers or --batch-size, or enlarge /dev/shm"
            ) from error

    def _checked(self, images: Tensor, labels: Tensor, bad: list[tuple[int, str, str]]) -> Batch:
        """The batch with its bad images reported and out of the way, and a stream's labels in range."""
        for _, name, reason in bad:
            self.bad.report(name, reason)
        if self.stream and (top := int(labels.max())) >= self.num_classes:
            raise_label(top, self.num_classes, self.title)
        return self._without(images, labels, [row for row, _, _ in bad]) if bad else (images, labels)

    def _without(self, images: Tensor, labels: Tensor, rows: list[int]) -> Batch:
        """The batch without its bad rows: in training good rows of the same batch take their places."""
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[rows] = False
        good = keep.nonzero()[:, 0]
        if self.order.train:
            if not len(good):
                raise ValueError(f"{self.title}: not one image of a batch of {len(labels)} can be decoded")
            good = good[torch.arange(len(labels)) % len(good)]
        return images[good], labels[good]

    def _map_items(self, epoch: int, start: int) -> Iterator[list[Item]]:
        order = self.order
        permutation = order.permutation(epoch)
        for batch in range(start, order.batches):
            positions = order.positions(batch)
            chosen = permutation[positions.start : positions.stop : positions.step].tolist()
            yield [(epoch, p, index) for p, index in zip(positions, chosen, strict=True)]

    def _stream_items(self, epoch: int, start: int) -> Iterator[list[Item]]:
        order = self.order
        records = self._endless(epoch)
        for batch in range(order.batches):
            wanted = len(order.positions(batch))
            share = [next(records) for _ in range(wanted)]
            if batch >= start:
                yield [(epoch, position, record) for position, record in share]

    def _endless(self, epoch: int) -> Iterator[tuple[int, Record]]:
        """The stream's records; in training from the start again when this process's shards end early."""
        order, lap, number = self.order, 0, -1
        assert self.stream is not None
        while True:
            for number, record in self.stream.records(
                seed=mix(order.seed, epoch, lap), rank=order.rank, world_size=order.world_size
            ):
                yield number + lap * order.n * order.world_size, record
            if number < 0 or not order.train:
                raise RuntimeError(
                    f"{self.title} ended after {number + 1} images, but {order.n} were announced; "
                    "give the right --num-samples"
                )
            lap += 1


def decode_all(source: Source, fit: Fit, in_chans: int, bad: BadImages, threads: int) -> tuple[Tensor, Tensor]:
    """Every image of a source through `fit`: uint8 (n,C,S,S) and labels (n,), undecodable ones left out.

    threads pay off where decoding is long; for small images they only wait for one another.
    """

    def some(start: int) -> list[tuple[Tensor | None, int, str, str]]:
        found: list[tuple[Tensor | None, int, str, str]] = []
        for index in range(start, min(start + CHUNK, len(source))):
            record = source[index]
            try:
                found.append((fit.decoded(record.image, in_chans), record.label, record.name, ""))
            except Exception as error:  # as in Views
                found.append((None, record.label, record.name, reason_of(error)))
        return found

    images: Tensor | None = None
    labels: list[int] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        # a window of chunks at a time: map() over everything would hold every decoded image twice
        for window in range(0, len(source), 64 * CHUNK):
            for found in pool.map(some, range(window, min(window + 64 * CHUNK, len(source)), CHUNK)):
                for image, label, name, reason in found:
                    if image is None:
                        bad.report(name, reason)
                        continue
                    if images is None:
                        images = torch.empty(len(source), *image.shape, dtype=torch.uint8)
                    images[len(labels)] = image
                    labels.append(label)
    if images is None:
        raise ValueError(f"not one of the {len(source)} images can be decoded (first: {source[0].name})")
    return images[: len(labels)], torch.tensor(labels, dtype=torch.int64)
