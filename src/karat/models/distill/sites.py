"""Where teacher and student meet: the attention modules of the same name, and what reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from karat.models.attention import AttentionInputs
from karat.models.backbones import attention_sites, kind_of
from karat.operator.operator import KArAtOperator


class Arguments(NamedTuple):
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

    def read(self, call: Arguments) -> tuple[AttentionInputs, AttentionInputs]:
        """(student's, teacher's) queries, keys, values for the same input tokens.

        Raises ValueError where heads, their width or tokens differ.
        """
        mine, theirs = _inputs(self.student, call), _inputs(self.teacher, call)
        if mine.k.shape != theirs.k.shape:
            sizes = " and ".join("{1} heads of width {3} over {2} tokens".format(*x.k.shape) for x in (mine, theirs))
            raise ValueError(
                f"{self.name} of student and teacher have {sizes}: the student must be the teacher, its attention "
                "converted by karat.karatize"
            )
        return mine, theirs


def _inputs(module: nn.Module, call: Arguments) -> AttentionInputs:
    kind = kind_of(module)
    assert kind is not None  # see `sites`
    assert kind.inputs is not None
    return kind.inputs(module, *call.args, **call.kwargs)


def sites(student: nn.Module, teacher: nn.Module) -> list[Site]:
    """The converted attentions of `student`, in forward order, each beside the teacher's.

    Raises ValueError if the student has none, or the teacher's isn't softmax attention that karat can replace.
    """
    found, others = [], dict(teacher.named_modules())
    for name, module, kind in attention_sites(student):
        if kind.learned:
            other = others.get(name)
            if other is None:
                raise ValueError(f"the teacher has no {name}: give the model that the student was converted from")
            theirs = kind_of(other)
            if theirs is None or theirs.adapter is None:
                raise ValueError(f"the teacher's {name} is {type(other).__name__}: it must be softmax attention")
            found.append(Site(name, module, other))
    if not found:
        raise ValueError("the student has no learnable attention: name one, e.g. --attention g3b")
    return found


class _ReachedError(Exception):
    """The forward pass got as far as it has to."""


@torch.no_grad()
def arguments_at(model: nn.Module, module: nn.Module, images: Tensor) -> Arguments:
    """The arguments with which `model(images)` calls `module`; what lies beyond isn't computed."""
    found: list[Arguments] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Arguments(args, kwargs))
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
def watching(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Arguments, Tensor]]]:
    """While open, each forward pass notes the arguments and the output of every one of `modules`."""
    seen: dict[nn.Module, tuple[Arguments, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen[module] = Arguments(args, kwargs), output

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
