"""The random states that a training step may draw from, as JSON: python, numpy, torch and the accelerators.

timm's mixup draws from numpy's global state, drop path and dropout from torch's, some augmentations from python's.
"""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's mixup draws from numpy's global state
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """The present random states of this process, fit for JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned; the following draws repeat exactly."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


@contextlib.contextmanager
def aside(seed: int) -> Iterator[None]:
    """Seed everything for the block's duration and put the states back after it.

    What happens inside neither depends on the training's random states nor changes them: used for what a resumed run
    does again or does not do again, such as opening a loader half-way or evaluating.
    """
    before = capture()
    seed_everything(seed)
    try:
        yield
    finally:
        restore(before)
