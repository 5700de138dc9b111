"""Where the randomness of order and augmentation comes from.

Every random choice is a function of (seed, epoch, position in the epoch): the same image gets the same
augmentation however many worker processes or machines there are, and whether or not the run was
interrupted.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

MASK = 2**64 - 1


def mix(*keys: int) -> int:
    """One 64-bit number from several: splitmix64's finaliser (Steele et al. 2014), folded over the keys."""
    state = 0
    for key in keys:
        state = (state + (key & MASK) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def uniforms(key: int, positions: Sequence[int], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), shape (len(positions), draws), each a function of (key, position, draw) alone."""
    counter = np.asarray(positions, dtype=np.uint64)[:, None] * np.uint64(draws) + np.arange(draws, dtype=np.uint64)
    state: Any = np.uint64(key) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextlib.contextmanager
def keyed_randomness(key: int) -> Iterator[None]:
    """Seed python, numpy and torch (CPU) from `key`: timm's and torchvision's transforms draw from all three.

    In the main process the three states are put back afterwards, so that loading never disturbs the
    model's own randomness (dropout, drop path); a worker process has no other use for them.
    """
    in_worker = get_worker_info() is not None
    if not in_worker:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  the state that transforms draw from
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002  as above
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        if not in_worker:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002  as above
            torch.set_rng_state(before[2])
