"""Modules put in the places of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

HOOKS = tuple(name for name in vars(nn.Module()) if "ward" in name)  # those of forward and backward passes


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the places of old ones, in place: in all of them where one stands in several.

    Hooks on the old ones are on the new, and their handles remove them there.
    """
    for old, module in new.items():
        module.__dict__.update({name: old.__dict__[name] for name in HOOKS})
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
