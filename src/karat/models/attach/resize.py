"""Attached operators carried to another size of images: the example is run again at that size."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from karat.errors import first_line
from karat.models.attach.example import example_of
from karat.models.attach.mode import attached
from karat.models.attach.place import key_numbers
from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import resample_operator

Grid = tuple[int, int]


def has_attached(model: nn.Module) -> bool:
    """Whether a model that karat has no record of has operators."""
    return any((place := attached(module)) is not None and place.learned for module in model.modules())


@torch.no_grad()
def resize_attached(model: Any, *args: Any, img_size: Sequence[int] | None = None, **kwargs: Any) -> None:
    """timm's `set_input_size` where the model has it, and operators on the key grids of images of that size.

    A grid is told from the number of keys: cells after the prefix tokens that have the image's proportions.

    Raises ValueError, the model unchanged, where a size can't be had or a grid can't be told.
    """
    if img_size is None and args:
        img_size, args = args[0], args[1:]
    size: Grid | None = None
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    old = _sides(model, None)
    trial = copy.deepcopy(model)  # what fails fails here
    try:
        set_size(trial, size, args, kwargs)
        new, numbers = _sides(trial, size), key_numbers(trial, example_of(trial, size))
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = first_line(error.__cause__ or error)  # of a model that can't take an example its own
        raise ValueError(f"{type(model).__name__} can't have images of {size or old}: {reason}") from error
    moves: dict[KArAtOperator, tuple[str, int]] = {}
    for name, module in model.named_modules():
        place = attached(module)
        if place is not None and place.learned:
            served = [i for i, layout in enumerate(place.layouts) if layout is not None]
            for i, keys in zip(served, numbers.get(name, []), strict=True):
                operator = place.operator(i)
                assert operator is not None
                if moves.setdefault(operator, (name, keys))[1] != keys:
                    raise ValueError(f"{name} would have {keys} keys and {moves[operator][0]} others, of one operator")
    steps = [
        (operator, *_grids(name, (operator.num_tokens, old), (keys, new), int(getattr(model, "num_prefix_tokens", 0))))
        for operator, (name, keys) in moves.items()
        if operator.num_tokens != keys
    ]
    set_size(model, size, args, kwargs)
    for operator, before, after, prefix in steps:
        resample_operator(operator, before, after, prefix)


def set_size(model: Any, size: Grid | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The method of the model's class, where it has one."""
    if hasattr(type(model), "set_input_size"):
        type(model).set_input_size(model, size, *args, **kwargs)


def _sides(model: Any, size: Grid | None) -> Grid:
    """Height and width of the model's images."""
    try:
        example = example_of(model, size)
    except ValueError:
        raise ValueError(
            f"{type(model).__name__} doesn't say what its images are: build it anew at another size, and carry each "
            "operator over by karat.resample_operator(operator, old_grid, new_grid)"
        ) from None
    images = example.get("pixel_values") if isinstance(example, dict) else example
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise ValueError(f"{type(model).__name__} takes no images, so it has no other image size; build it anew")
    return int(images.shape[-2]), int(images.shape[-1])


def _grids(name: str, old: tuple[int, Grid], new: tuple[int, Grid], prefix: int) -> tuple[Grid, Grid, int]:
    """The key grids before and after, and how many keys come before them."""
    for first in dict.fromkeys((prefix, 0)):
        before, after = (_grid(keys - first, sides) for keys, sides in (old, new))
        if before is not None and after is not None:
            return before, after, first
    raise ValueError(
        f"{name} had {old[0]} keys and would have {new[0]}: no grids of the images' proportions, so karat can't tell "
        "how they lie; carry each operator over by karat.resample_operator(operator, old_grid, new_grid)"
    )


def _grid(cells: int, sides: Grid) -> Grid | None:
    """(h, w) of so many cells in the proportions of an image."""
    divisor = math.gcd(*sides)
    h, w = sides[0] // divisor, sides[1] // divisor
    times = math.isqrt(max(cells, 0) // (h * w))
    return (h * times, w * times) if times and h * w * times * times == cells else None
