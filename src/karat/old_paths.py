"""Module paths of earlier versions: each hands on what a room has now, so that people's scripts go on.

Nothing in the package imports one (tests/test_house.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PATHS: dict[str, tuple[str, ...]] = {  # the modules, in whose order a name is looked for
    "karat.attention": ("karat.models.attention",),
    "karat.convert": ("karat.models.karatize",),
    "karat.distill": ("karat.models.distill",),
    "karat.export": ("karat.share.export",),
    "karat.grids": ("karat.operator.grids",),
    "karat.hub": ("karat.share.hub",),
    "karat.hub.config": ("karat.runs.saved",),
    "karat.hub.runs": ("karat.share.hub.runs",),
    "karat.kan": ("karat.models.kan",),
    "karat.train.data": ("karat.old_paths", "karat.data.splits"),
    "karat.train.data_augment": ("karat.old_paths", "karat.data.images", "karat.data.augmentation"),
    "karat.train.recipes": ("karat.runs.recipes",),
    "karat.train.run_model": ("karat.runs.model",),
    "karat.train.settings": ("karat.runs.classification",),
}


class OldPaths(MetaPathFinder, Loader):
    """Finds the modules of PATHS."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of an old path; None for any other, which is as missing as it was."""
        return ModuleSpec(fullname, self, is_package=fullname == "karat.hub") if fullname in PATHS else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module find its names where they are now, when they are asked for."""

        def find(name: str) -> Any:
            for home in () if name.startswith("__") else PATHS[module.__name__]:
                found = getattr(importlib.import_module(home), name, None)
                if found is not None:
                    return found
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__doc__ = f"{PATHS[module.__name__][-1]} under its old path."
        module.__dict__["__getattr__"] = find


def load_data(spec: str, *, recipe: Any, batch_size: int | None = None, **options: Any) -> Any:
    """As `karat.data.splits.load_data` of `DataOptions(spec, ..., **options)`; batch_size None is the recipe's."""
    splits = importlib.import_module("karat.data.splits")
    return splits.load_data(splits.DataOptions(spec, recipe.augmentation, batch_size or recipe.batch_size, **options))


def decode(source: Any, in_chans: int = 3) -> Any:
    """As `karat.data.images.read_image`."""
    return importlib.import_module("karat.data.images").read_image(source, in_chans)
