"""Taking a module's calls of attention while it runs, and no others."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from karat.models.attach.calls import (
    CALLS,
    SUMS,
    Call,
    Fused,
    Layout,
    masked_sum,
    module_forward,
    multi_head_attention,
)
from karat.models.attention import Intermediate, split_mask
from karat.models.tracing import SHARED, traced
from karat.operator.operator import KArAtOperator
from karat.ops.masks import safe_softmax

Observer = Callable[[int, Intermediate], None]
Take = Callable[[int, Call, Callable[[], Tensor]], Tensor]


class Taking(TorchFunctionMode):
    """While active, hands every call of attention to `take` with its number.

    Of the rest it touches masks alone, where they are added to scores over so many `keys`. again: whether a call will
    run once more for its gradients, when this is no longer active.
    """

    def __init__(self, take: Take, written: bool = True, keys: Collection[int] = frozenset()) -> None:
        super().__init__()
        self.take, self.written, self.keys, self.number = take, written, keys, 0
        self.graph, self.again = torch.is_grad_enabled(), False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head_attention(*args, **kwargs)
        if func in CALLS:
            call = CALLS[func](*args, **kwargs)
            if call is not None and (self.written or isinstance(call, Fused)):
                self.number += 1
                self.again = self.again or (self.graph and not torch.is_grad_enabled() and _will_run_again())
                return self.take(self.number - 1, call, lambda: func(*args, **kwargs))
        if self.keys and func in SUMS:
            return masked_sum(func, args, kwargs, self.keys)
        return func(*args, **kwargs)


def _will_run_again() -> bool:
    """Whether this runs in a checkpoint with use_reentrant=True; the other kind complains itself."""
    return any(frame.f_code is CheckpointFunction.forward.__code__ for frame, _ in traceback.walk_stack(None))


class Attached:
    """In the place of an attention module's `forward`: the same, with operators where it calls for attention.

    The module keeps its class and its parameters and gains `operator`, a list of them where it calls several times.
    An object and not a closure, so that a copied or pickled model has its own.

    Args:
        module: the attention.
        layouts: where the heads are, for each of its calls; None: a call that stays.
        shared: the operator of all blocks, registered elsewhere; None: the module's own.
        written: whether softmax that is written out is one of its calls.
        learned: whether it has operators; otherwise it is as it was, only `karat.record` looks.
        windows: whether an image has several score matrices of a head.
    """

    def __init__(
        self,
        module: nn.Module,
        layouts: tuple[Layout | None, ...],
        shared: KArAtOperator | None = None,
        *,
        written: bool,
        learned: bool,
        windows: bool = False,
    ) -> None:
        self.module, self.layouts, self.shared = module, layouts, shared
        self.written, self.learned, self.windows = written, learned, windows
        self.before = module.__dict__.get("forward")
        self.observer: Observer | None = None
        self.index = 0  # among the model's attention, in forward order
        self.inside = False  # another's module, whose mode isn't to see what becomes of this one's calls

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.before or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.learned:
            node = traced(self.module, args, kwargs, None if self.shared is None else SHARED)
            if node is not None:
                return node
            if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
                raise ValueError(
                    f"{type(self.module).__name__} has operators, whose keys have places: pad nested tensors, "
                    "x.to_padded_tensor(0.0), and mask the padding"
                )
        taking = Taking(self.taken_alone if self.inside else self.take, self.written, self.written_keys())
        with taking:
            if self.before is not None:
                out = self.before(*args, **kwargs)
            else:
                out = module_forward(self.module)(self.module, *args, **kwargs)
        if self.learned and taking.number != len(self.layouts):
            raise ValueError(self._changed(taking.number))
        if self.learned and taking.again:
            raise ValueError(
                f"{type(self.module).__name__} checkpoints its own call for attention, which would run again without "
                "its operator: checkpoint the whole module, or the block around it"
            )
        return out

    def replica(self) -> Any:
        """The module as `nn.DataParallel` copies it, shallow, with a place of its own."""
        twin = copy.copy(self)
        twin.module = type(self.module)._replicate_for_data_parallel(self.module)
        twin.module.forward = twin
        return twin.module

    def taken_alone(self, *call: Any) -> Tensor:
        """`take`, unseen by the modes around it."""
        with torch._C.DisableTorchFunction():
            return self.take(*call)

    def take(self, number: int, call: Call, otherwise: Callable[[], Tensor]) -> Tensor:
        """The result of one call, (…,M,D) or (…,M,N)."""
        if number >= len(self.layouts):
            if not self.learned:
                return otherwise()
            raise ValueError(self._changed(number + 1))
        layout = self.layouts[number]
        if layout is None:
            return otherwise()
        operator = self.operator(number)
        if operator is None and self.observer is None:
            return otherwise()
        layout = layout.fits(len(call.shape) - 2)
        if isinstance(call, Fused):
            inputs = call.inputs(layout)
            if self.observer is not None:
                self._observe(number, operator, inputs.scores, inputs.mask)
            if operator is None:
                return otherwise()
            q, k, v, scale, bias, mask = inputs
            out = operator.attend(q, k, v, scale=scale, bias=bias, mask=mask, dropout_p=call.dropout_p)
            return layout.unfold(out, call.query.shape[:-2])
        bare, mask = split_mask(layout.fold(call.scores if call.dtype is None else call.scores.to(call.dtype)))
        assert bare is not None
        scores = bare
        if self.observer is not None:
            self._observe(number, operator, scores, mask)
        return otherwise() if operator is None else layout.unfold(operator(scores, mask), call.scores.shape[:-2])

    def operator(self, number: int) -> KArAtOperator | None:
        """The operator of one of its calls."""
        if not self.learned:
            return None
        if self.shared is not None:
            return self.shared
        own: Any = self.module.operator
        if isinstance(own, nn.ModuleList):
            own = own[sum(layout is not None for layout in self.layouts[:number])]
        found: KArAtOperator = own
        return found

    def written_keys(self) -> set[int]:
        """The numbers of keys of calls that are written out and have an operator."""
        if not self.written or not self.learned:
            return set()
        operators = [self.operator(i) for i, layout in enumerate(self.layouts) if layout is not None]
        return {operator.num_tokens for operator in operators if operator is not None}

    def _observe(self, number: int, operator: KArAtOperator | None, scores: Tensor, mask: Tensor | None) -> None:
        assert self.observer is not None
        sigma = safe_softmax(scores, mask) if operator is None else operator(scores, mask)
        self.observer(number, Intermediate(scores, sigma, mask))

    def _changed(self, number: int) -> str:
        return (
            f"{type(self.module).__name__} called for attention {number} times and {len(self.layouts)} times in its "
            "example: its operators can't be told apart; give karatize an example of the way it is used"
        )


def attached(module: nn.Module) -> Attached | None:
    """What stands in the place of a module's forward; None where nothing does."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, Attached) else None


def keep_to_module(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: with one nn.TransformerEncoderLayer leaves its fused path, past attention."""


@contextmanager
def observed(place: Attached, observer: Observer) -> Iterator[None]:
    """While open, `observer` sees each call's scores and σ, as do those that saw them before."""
    before = place.observer

    def both(number: int, found: Intermediate) -> None:
        for see in filter(None, (before, observer)):
            see(number, found)

    place.observer = both
    try:
        yield
    finally:
        place.observer = before
