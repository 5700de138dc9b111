"""timm's models finished before timm takes them apart for features_only=True."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from karat.models.attach.mode import attached
from karat.models.karatize import NoWeightDecay
from karat.operator.operator import KArAtOperator, karat_operators

Finish = Callable[[nn.Module], nn.Module]

_OF_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def create_finished(name: str, finish: Finish, **kwargs: Any) -> nn.Module:
    """timm.create_model, and `finish` of the whole model: with features_only=True, before timm takes its features.

    So operators are those of the whole model, whatever blocks the features leave out, and torch.fx traces them.

    Raises ValueError where the features are taken from a model without the operator that its blocks share.
    """
    if not kwargs.get("features_only"):
        return finish(timm.create_model(name, **kwargs))
    given = kwargs.get("feature_cls")
    taker = _usual(name, kwargs) if given is None or isinstance(given, str) else given
    features = timm.create_model(name, **kwargs | {"feature_cls": _after(finish, taker)})
    arguments: Any = features._model_args  # timm's, for a model that is built again
    arguments.pop("feature_cls")
    if given is not None:
        arguments["feature_cls"] = given
    _check_operators(features)
    if karat_operators(features):
        features.no_weight_decay = NoWeightDecay(features)
    return features


def _usual(name: str, kwargs: dict[str, Any]) -> Any:
    """The class that takes this model's features, asked of a twin without numbers."""
    with torch.device("meta"):
        return type(timm.create_model(name, **{key: kwargs[key] for key in kwargs if key not in _OF_WEIGHTS}))


def _after(finish: Finish, taker: Any) -> Any:
    """What takes the features of a finished model, of the same kind: timm asks for subclasses."""
    if not isinstance(taker, type):
        return lambda model, **settings: taker(finish(model), **settings)

    def take(_: Any, model: nn.Module, **settings: Any) -> Any:
        return taker(finish(model), **settings)

    return type(taker.__name__, (taker,), {"__new__": take})


def _check_operators(features: nn.Module) -> None:
    known = set(features.modules())
    for name, module in features.named_modules():
        place = attached(module)
        used = getattr(module, "operator", None) if place is None else place.shared
        if isinstance(used, KArAtOperator) and used not in known:
            raise ValueError(
                f"{name} shares its operator with other blocks, and {type(features).__name__} takes the blocks out of "
                "their model: give feature_cls='getter', or sharing='blockwise' (g3b instead of g3u)"
            )
