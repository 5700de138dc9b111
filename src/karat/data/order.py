"""Which images, in which order, for which process; and what becomes of those that can't be decoded.

In epoch e the images have one global order, drawn from (seed, e). Batch b of process r out of W takes the positions
b·B·W + r, b·B·W + r + W, ...: the W processes together see what one process with batch B·W sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.data.randomness import mix


class BadImages:
    """Images that could not be decoded: raises at the first one, or counts them (each name once)."""

    def __init__(self, mode: str) -> None:
        if mode not in ("error", "skip"):
            raise ValueError(f"on_bad_image={mode!r}: give 'error' or 'skip'")
        self.mode = mode
        self.names: dict[str, str] = {}

    def report(self, name: str, reason: str) -> None:
        if self.mode == "error":
            raise ValueError(f"{name}: cannot be decoded ({reason}); repair or remove it, or pass --on-bad-image skip")
        self.names[name] = reason


class ImageOrder:
    """Who reads what: n samples in batches over world_size processes, shuffled and repeated for training.

    Training takes whole batches only (timm's drop_last), and a batch no larger than the data; evaluation
    takes every sample exactly once, in `batches`, and some process has `most_batches`, one more. repeats > 1 is
    repeated augmentation (Hoffer et al. 2019, as in DeiT): each image `repeats` times in a row, on different
    processes, over as many batches as without.
    """

    def __init__(
        self, n: int, batch_size: int, *, train: bool, seed: int, rank: int, world_size: int, repeats: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: give 0 <= rank < world_size")
        if n < world_size:
            raise ValueError(f"{n} images for {world_size} processes: use at most {n} processes")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        if train and n < batch_size * world_size:
            batch_size = max(1, n // world_size // 2 * 2)  # even, as mixup asks
        self.n, self.batch_size, self.train, self.seed = n, batch_size, train, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        total = batch_size * world_size
        self.most_batches = n // total if train else -(-n // total)
        self.batches = self.most_batches if train else -(-len(range(rank, n, world_size)) // batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """The global order of epoch: position -> sample, (n,) int64."""
        if not self.train:
            return torch.arange(self.n)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.n, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.n] if self.repeats > 1 else order

    def positions(self, batch: int) -> range:
        """The positions of one batch of this process."""
        start = batch * self.batch_size * self.world_size
        stop = min(start + self.batch_size * self.world_size, self.n)
        return range(start + self.rank, stop, self.world_size)
