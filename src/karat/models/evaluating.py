"""Models in evaluation mode, or computed by another implementation, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from karat.operator.operator import karat_operators


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the context is open; then each of its modules in the mode it came in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def computed_by(model: nn.Module, impl: str) -> Iterator[None]:
    """Every operator of the model computed by this implementation while the context is open; then as it was."""
    before = {op: op.config for op in karat_operators(model).values()}
    try:
        for op, config in before.items():
            op.config = replace(config, impl=impl)
        yield
    finally:
        for op, config in before.items():
            op.config = config
