"""Where a model calls for attention: one run of an example tells."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from karat.errors import first_line
from karat.models.attach.calls import Call, Fused, Layout, heads_of, layout_of, settled
from karat.models.attach.example import Example, alike, fitted, images_of
from karat.models.attach.mode import Taking
from karat.models.evaluating import evaluating
from karat.operator.config import KArAtConfig
from karat.operator.fixed import FIXED


@dataclass
class Found:
    """A module that calls for attention, in forward order.

    calls: for each call of one pass of it the layout of its heads, or why it can't be told; sizes: (H, M, N) of each.
    windows: whether one call has more than a score matrix for each head and image. heads: the number that is named.
    """

    name: str
    module: Any
    calls: list[Layout | str] = field(default_factory=list)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    written: bool = False
    reason: str | None = None
    windows: bool = False
    heads: int | None = None

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """The layout of each call; None where it can't be told."""
        return tuple(None if isinstance(call, str) else call for call in self.calls)

    @property
    def served(self) -> list[tuple[int, int, int]]:
        """The sizes (H,M,N) of the calls that can have an operator."""
        return [size for size, layout in zip(self.sizes, self.layouts, strict=True) if layout is not None]

    def refusal(self, config: KArAtConfig) -> str | None:
        """Why this module stays as it is; None if it can be converted."""
        if self.reason is not None:
            return self.reason
        if not self.served:
            return next((call for call in self.calls if isinstance(call, str)), "it makes no call for attention")
        places = config.is_static or config.position is not None
        own_key = config.is_fixed and FIXED[config.basis].own_key
        for _, queries, keys in self.served:
            if own_key and queries != keys:
                return f"{config} hides each query's own key, and it has {queries} queries for {keys} keys"
            if places and queries != keys:
                return (
                    f"static mixing and position='query' give each query a place, and it has {queries} queries for "
                    f"{keys} keys"
                )
        if hasattr(self.module, "operator"):
            return "it has an attribute 'operator' of its own"
        return None


@dataclass
class _Pass:
    """One forward pass of one module."""

    modules: list[nn.Module]  # innermost first
    calls: list[Call] = field(default_factory=list)
    idle: list[Call] = field(default_factory=list)  # of its calls those that have weighed nothing, yet


class _Looking(Taking):
    """Notes, beside calls of attention, which results of softmax go into a product of matrices: scores' do, a
    classifier's or a router's don't."""

    def __init__(self, take: Any) -> None:
        super().__init__(take)
        self.weights: Any = WeakTensorKeyDictionary()  # what became of a result -> its call and the pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if torch.compiler.is_compiling():  # a part that a model compiles itself
            return out
        given = [*args, *(kwargs or {}).values()]
        for x in [*given, *(x for many in given if isinstance(many, list | tuple) for x in many)]:
            known = self.weights.get(x) if isinstance(x, Tensor) else None
            if known is None:
                continue
            call, owner = known
            if getattr(func, "__name__", "") in PRODUCTS:
                owner.idle[:] = [other for other in owner.idle if other is not call]
            elif isinstance(out, Tensor) and out.numel() <= 2 * math.prod(call.shape):
                self.weights[out] = known
        return out


PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "einsum", "tensordot", "mv")


def find(model: nn.Module, example: Example) -> list[Found]:
    """Every module that calls for attention, in the order of a forward pass of the example.

    Fused attention counts wherever it is called; softmax over the last axis inside of a module that looks like
    attention, by its class's name, a number of heads or its projections. A call belongs to the innermost module.

    Runs once, under no_grad and in evaluation mode; buffers, random states and modes are afterwards what they were.
    Where images and heads are in one axis it runs again, for images that are alike.

    Raises ValueError for an example that the model can't take.
    """
    args, kwargs = fitted(example, model)
    try:
        with left_as_it_was(model), evaluating(model), torch.no_grad():
            passes = _run(model, args, kwargs)
    except (RuntimeError, TypeError, AssertionError, IndexError, ValueError, KeyError, AttributeError) as error:
        shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        raise ValueError(
            f"{type(model).__name__} can't take the example {', '.join(map(str, shapes))}: {first_line(error)}; give "
            "karatize an input of the kind that it takes, example=..."
        ) from error
    batch = images_of(args, kwargs)
    found = {module: _found(own, batch) for module, own in passes.items()}
    _settle(model, found, alike(args, kwargs), batch)
    names = {module: name for name, module in model.named_modules()}
    for module, site in found.items():
        site.name = names[module]
    return list(found.values())


def _settle(model: nn.Module, found: dict[nn.Module, Found], example: Any, batch: int) -> None:
    """What a first axis is, for those layouts that rest on it."""
    unsure = {
        module: site
        for module, site in found.items()
        if not isinstance(module, nn.MultiheadAttention)
        and any(isinstance(x, Layout) and x.leading == 1 and (x.folded or site.heads != 1) for x in site.calls)
    }
    if batch < 2 or not unsure:
        return
    with left_as_it_was(model), evaluating(model), torch.no_grad():
        passes = _run(model, *example)
    for module, site in unsure.items():
        calls = _kept(passes[module])[0]
        site.calls = [
            settled(x, call, batch) if isinstance(x, Layout) else x for x, call in zip(site.calls, calls, strict=True)
        ]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[nn.Module, list[_Pass]]:
    """The passes of each module that calls for attention."""
    stack: list[_Pass] = []
    passes: dict[nn.Module, list[_Pass]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        inner = [module, *(stack[-1].modules if stack else [])]
        stack.append(_Pass(inner))

    def leave(*_: Any) -> None:
        stack.pop()

    def note(_: int, call: Call, otherwise: Callable[[], Tensor]) -> Tensor:
        depth = len(stack) - 1
        while depth > 0 and isinstance(stack[depth].modules[0], nn.Softmax):
            depth -= 1
        if depth >= 0:
            owner = stack[depth]
            if isinstance(call, Fused) or any(map(_looks_like_attention, owner.modules[:2])):
                owner.calls.append(call)
                result = otherwise()
                if not isinstance(call, Fused):
                    owner.idle.append(call)
                    looking.weights[result] = call, owner
                own = passes.setdefault(owner.modules[0], [])
                if not own or own[-1] is not owner:
                    own.append(owner)
                return result
        return otherwise()

    looking = _Looking(note)
    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with looking:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return passes


QUERIES = ("qkv", "to_qkv", "q_proj", "to_q", "query", "q", "wq", "Wqkv", "in_proj_weight")


def _looks_like_attention(module: nn.Module) -> bool:
    """By the class's name, a number of heads, or projections that carry a usual name of queries."""
    named = re.search(r"attention|attn|(^|[^a-z])XCA", type(module).__name__, re.IGNORECASE)
    projects = any(hasattr(module, name) for name in ("attn_drop", *QUERIES))
    return named is not None or projects or heads_of([module]) is not None


def _kept(passes: list[_Pass]) -> list[list[Call]]:
    """The calls of each pass of one module: the fused ones alone, where there are any."""
    written = not any(isinstance(call, Fused) for call in passes[0].calls)
    return [[call for call in own.calls if written or isinstance(call, Fused)] for own in passes]


def _found(passes: list[_Pass], batch: int) -> Found:
    """What the passes of one module say."""
    modules, kept = passes[0].modules, _kept(passes)
    written = not any(isinstance(call, Fused) for call in passes[0].calls)
    either = isinstance(modules[0], nn.MultiheadAttention)  # one call a pass: which, need_weights says
    found = Found("", modules[0], written=written or either)
    counts = sorted({len(calls) for calls in kept})
    if len(counts) > 1:
        found.reason = f"it calls for attention {' or '.join(map(str, counts))} times, from pass to pass"
        return found
    heads = heads_of(modules)
    if counts[0] > 1 and counts[0] == heads and all(len(call.shape) == 3 for call in kept[0]):
        heads = 1  # a call for each head
    found.heads = heads
    for number, call in enumerate(kept[0]):
        layout = Layout(heads) if either and heads is not None else layout_of(call, heads, batch)
        if any(call is idle for idle in passes[0].idle):
            layout = "no product of matrices weighs values by its softmax"
        found.calls.append(layout)
        own = 0 if isinstance(layout, str) else layout.heads
        found.windows = found.windows or math.prod(call.shape[:-2]) > batch * (own or math.inf)
        found.sizes.append((own, call.shape[-2], call.shape[-1]))
        keys = sorted({calls[number].shape[-1] for calls in kept})
        if len(keys) > 1:
            found.reason = (
                f"its number of keys changes from call to call ({', '.join(map(str, keys))}), and an operator is made "
                "for one"
            )
    return found


def check_whole(model: nn.Module) -> None:
    """ValueError for a model that is wrapped, compiled, or drops tokens at random."""
    kind = type(model)
    wrapped = kind.__name__ in ("OptimizedModule", "FullyShardedDataParallel") or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.jit.ScriptModule
    )
    if wrapped:
        raise ValueError(f"the model is wrapped ({kind.__name__}): convert it first, then compile or distribute it")
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(f"{name or 'the model'} is compiled: convert the model first, then compile it")
        if isinstance(module, PatchDropout) and module.prob > 0:
            raise ValueError(
                f"{name}: patch_drop_rate={module.prob} changes the number of tokens at random, the operator needs it "
                "fixed; build the model with patch_drop_rate=0"
            )


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers, attributes and random states are what they were."""
    states = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that models draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)  # noqa: NPY002  as above
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for module, attributes, buffers in states:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
