"""Where teacher and student meet: the attention modules of the same name, and what reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.models.convit import MHSA
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from karat.models.attention import (
    CONVERTED,
    AttentionInputs,
    KArAtAttention,
    KArAtWindowAttention,
    token_inputs,
    window_inputs,
)
from karat.operator.operator import KArAtOperator
from karat.ops.masks import safe_softmax

READERS: dict[type[nn.Module], Callable[..., AttentionInputs]] = {
    Attention: token_inputs,
    MHSA: token_inputs,
    KArAtAttention: token_inputs,
    WindowAttention: window_inputs,
    KArAtWindowAttention: window_inputs,
}


class Call(NamedTuple):
    """The arguments with which a module was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Site(NamedTuple):
    """One attention of the student, learnable, and the teacher's softmax attention in the same place."""

    name: str
    student: Any
    teacher: Any

    @property
    def operator(self) -> KArAtOperator:
        """The student's operator."""
        return self.student.operator

    def read(self, call: Call) -> tuple[AttentionInputs, AttentionInputs]:
        """(student's, teacher's) queries, keys, values for the same input tokens."""
        student, teacher = (READERS[type(module)] for module in (self.student, self.teacher))
        return student(self.student, *call.args, **call.kwargs), teacher(self.teacher, *call.args, **call.kwargs)


def sites(student: nn.Module, teacher: nn.Module) -> list[Site]:
    """The converted attentions of `student`, in forward order, each beside the teacher's.

    Raises ValueError if the student has none, or the teacher's isn't softmax attention that karat can replace.
    """
    found = []
    for name, module in student.named_modules():
        if isinstance(module, CONVERTED):
            other = teacher.get_submodule(name)
            if type(other) not in READERS or isinstance(other, CONVERTED):
                raise ValueError(f"the teacher's {name} is {type(other).__name__}: it must be softmax attention")
            found.append(Site(name, module, other))
    if not found:
        raise ValueError("the student has no learnable attention: name one, e.g. --attention g3b")
    return found


class _ReachedError(Exception):
    """The forward pass got as far as it has to."""


@torch.no_grad()
def call_at(model: nn.Module, module: nn.Module, images: Tensor) -> Call:
    """The arguments with which `model(images)` calls `module`; what lies beyond isn't computed."""
    found: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs))
        raise _ReachedError

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(images)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def watching(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Call, Tensor]]]:
    """While open, each forward pass notes the arguments and the output of every one of `modules`."""
    seen: dict[nn.Module, tuple[Call, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen[module] = Call(args, kwargs), output

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def four_axes(mask: Tensor | None) -> Tensor | None:
    """A mask with its leading axes written out: (B,H,M,N) or sizes of one."""
    return mask if mask is None or mask.dim() == 4 else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def softmax_of(inputs: AttentionInputs) -> Tensor:
    """The attention (B,H,M,N) that softmax gives."""
    return safe_softmax(inputs.scores, four_axes(inputs.mask))
