"""`karat.data.splits` under its old path, its options as keyword arguments."""

from __future__ import annotations

from typing import Any

from karat.data.splits import Data, DataOptions, open_splits
from karat.data.splits import load_data as _load_data
from karat.runs.recipes import Recipe

__all__ = ["Data", "load_data", "open_splits"]


def load_data(spec: str, *, recipe: Recipe, batch_size: int | None = None, **options: Any) -> Data:
    """As `karat.data.splits.load_data` of `DataOptions(spec, ..., **options)`; batch_size None is the recipe's."""
    return _load_data(DataOptions(spec, recipe.augmentation, batch_size or recipe.batch_size, **options))
