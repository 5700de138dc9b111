"""Data as a recipe's run reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from karat.data.splits import Data, DataOptions, load_data
from karat.runs.recipes import Recipe


def load(spec: str | Path, recipe: Recipe, **options: Any) -> Data:
    """The batches of a spec under a recipe, in its batch size unless the options say another."""
    return load_data(DataOptions(str(spec), recipe.augmentation, **{"batch_size": recipe.batch_size, **options}))
