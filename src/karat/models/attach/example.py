"""The example that tells where a model's attention is: given, or made from what the model says of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2  # so that images and heads are told apart

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def example_of(model: Any, img_size: Sequence[int] | None = None) -> Example:
    """Two images of zeros of the model's own size, or what a transformers model names as its inputs.

    timm and torchvision: `patch_embed.img_size`, else `img_size` or `image_size`, else the size in its pretrained_cfg.
    transformers: `image_size` of
    its configuration, else `dummy_inputs`.

    Raises ValueError where the model says nothing of the kind.
    """
    config = getattr(model, "config", None)
    if hasattr(model, "dummy_inputs") and config is not None:
        return _of_transformers(model, config, img_size)
    size = img_size or _pixels(model)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} doesn't say what its inputs are: give one, "
            "karat.karatize(model, ..., example=torch.zeros(2, 3, 224, 224))"
        )
    return torch.zeros(BATCH, channels(model), *size)


def _pixels(model: Any) -> tuple[int, int] | None:
    places = ((getattr(model, "patch_embed", None), "img_size"), (model, "img_size"), (model, "image_size"))
    for found in (getattr(*place, None) for place in places):
        if found is not None and not callable(found):
            return (found, found) if isinstance(found, int) else (int(found[-2]), int(found[-1]))
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = cfg.get("input_size")
    return None if size is None else (int(size[-2]), int(size[-1]))


def channels(model: Any) -> int:
    """The channels of the images: those of the first convolution, where timm doesn't say that none takes the image; 3
    where there is none.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("input_size") and cfg.get("first_conv") == []:
        return int(cfg["input_size"][0])
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _of_transformers(model: Any, config: Any, img_size: Sequence[int] | None) -> Example:
    side = img_size or getattr(config, "image_size", None)
    if getattr(model, "main_input_name", "") == "pixel_values" and side is not None:
        size = (side, side) if isinstance(side, int) else tuple(side)
        return {"pixel_values": torch.zeros(BATCH, getattr(config, "numchannels", 3), *size)}
    return dict(model.dummy_inputs)


def fitted(example: Example, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as arguments of a call, its tensors on the model's device and in its precision.

    Raises ValueError for an example of another kind.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)

    def fit(x: Any) -> Any:
        if not isinstance(x, Tensor) or first is None:
            return x
        return x.to(first.device, first.dtype) if x.is_floating_point() else x.to(first.device)

    if isinstance(example, Mapping):
        return (), {name: fit(x) for name, x in example.items()}
    if not isinstance(example, Tensor | tuple):
        raise ValueError(
            f"example must be a tensor, a tuple or a dict of keyword arguments, got {type(example).__name__}"
        )
    return tuple(fit(x) for x in (example if isinstance(example, tuple) else (example,))), {}


def images_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many inputs the example holds: the first axis of its first tensor."""
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), None)
    return 1 if first is None else len(first)


def alike(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with all inputs as the first; where it says nothing, being constant, of random numbers."""
    batch = images_of(args, kwargs)

    def first(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != batch:
            return x
        one = x[:1]
        if x.dim() > 2 and x.is_floating_point() and not x.is_meta and bool((one == one.flatten()[0]).all()):
            one = torch.randn_like(one)
        return one.expand_as(x).clone()

    return tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}


def described(example: Example) -> Any:
    """An example's names, shapes and kinds as plain values; None where it isn't of tensors alone."""
    if isinstance(example, Mapping):
        parts = {name: _plain(x) for name, x in example.items()}
        return parts if all(part is not None for part in parts.values()) else None
    values = [_plain(x) for x in (example if isinstance(example, tuple) else (example,))]
    return values if all(part is not None for part in values) else None


def _plain(x: Any) -> list[Any] | None:
    return [list(x.shape), str(x.dtype).removeprefix("torch.")] if isinstance(x, Tensor) else None


def from_description(plain: Any) -> Example:
    """An example of zeros as `described` wrote it down. Raises ValueError for what it never writes."""
    try:
        if isinstance(plain, Mapping):
            return {str(name): _zeros(part) for name, part in plain.items()}
        return tuple(_zeros(part) for part in plain)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise ValueError(f"no example of inputs can be read from {plain!r}") from None


def _zeros(part: Any) -> Tensor:
    shape, kind = part
    dtype = getattr(torch, kind)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(kind)
    return torch.zeros(*shape, dtype=dtype)
