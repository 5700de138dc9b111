"""When KAN layers use their formula as it is written down, in place of the leaner autograd function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from karat.ops.transforms import looked_through

_asked: ContextVar[bool] = ContextVar("karat_plain_formulas", default=False)


def plain_formulas(*tensors: Tensor) -> bool:
    """Whether the plain formula is wanted: under torch.compile and export, which fuse it, within `plain`, and for
    transforms of torch.func and tangents of these tensors, which see through nothing else."""
    return torch.compiler.is_compiling() or _asked.get() or looked_through(*tensors)


@contextmanager
def plain() -> Iterator[None]:
    """Within, every KAN layer is differentiable any number of times; it keeps more for the backward pass."""
    before = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(before)
