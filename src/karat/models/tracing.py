"""Modules that are one node to torch.fx: what they do depends on numbers that a tracer does not have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

SHARED = "an operator that blocks share"


def traced(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], elsewhere: str | None) -> Any:
    """The node that stands for a call of this module, where a tracer of torch.fx makes it; None for every other call.

    So `torch.fx.symbolic_trace` and the feature extraction of timm and torchvision keep the module, whatever modules
    they are told to keep.

    Args:
        module, args, kwargs: the call.
        elsewhere: what the module uses of others, which a graph that keeps the module alone would lack; None: nothing.

    Raises ValueError for a module that uses others, and for one that is the whole model.
    """
    proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)), None)
    if proxy is None:
        return None
    remedy = "use torch.export.export(model, ...)"
    tracer: Any = proxy.tracer
    name = tracer.path_of_module(module)
    if not name:
        raise ValueError(f"{type(module).__name__} is one node to torch.fx and can't be traced alone; {remedy}")
    if elsewhere is not None:
        raise ValueError(f"torch.fx keeps {name} alone, and it uses {elsewhere}; {remedy}")
    return tracer.create_proxy("call_module", name, args, dict(kwargs))


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's `forward` that is one node to torch.fx; the module's `elsewhere`, if it has one, is as in `traced`."""

    @functools.wraps(forward)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        node = traced(module, args, kwargs, getattr(module, "elsewhere", None))
        return forward(module, *args, **kwargs) if node is None else node

    return call
