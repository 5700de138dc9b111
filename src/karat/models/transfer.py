"""Attention transfer: a student runs on its teacher's attention and learns all the rest (SPEC §4, Table 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from karat.errors import first_line
from karat.models.attention import Intermediate, TransferredAttention
from karat.models.backbones import OWN, attention_sites
from karat.models.exchange import exchange
from karat.models.record import record


class TaughtBlock(NamedTuple):
    """A student's attention module and the name of the teacher's that it is given."""

    attention: TransferredAttention
    source: str


class TeacherHooks:
    """What happens around each forward pass of a student: the teacher looks at the images first.

    The teacher is no submodule: it is neither trained nor saved with the student, and stays in float32 and evaluation
    mode whatever the student does.
    """

    def __init__(self, teacher: nn.Module, blocks: list[TaughtBlock]) -> None:
        self.teacher, self.blocks = teacher, blocks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def begin(self, student: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Hand the teacher's attention for these images, the first argument, to every block."""
        like, images = next(self.teacher.parameters()), next(iter((*args, *kwargs.values())))
        if like.device != images.device:
            self.teacher.to(images.device)
        with torch.autocast(images.device.type, enabled=False):  # the student's precision is not the teacher's
            seen = look(self.teacher, images.to(like.dtype))
        for block in self.blocks:
            block.attention.given = seen[block.source]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def end(self, student: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """Take it back, so that it is never mixed up with other images (training needs it for the backward pass)."""
        if not student.training:
            for block in self.blocks:
                block.attention.given = None


@torch.no_grad()
def look(model: nn.Module, images: Tensor) -> dict[str, Intermediate]:
    """The attention of every block for images (B,C,S,S), in the order in which they run."""
    with record(model) as seen:
        model(images)
    return seen


def transfer_attention(student: nn.Module, teacher: nn.Module, example: Tensor) -> nn.Module:
    """Let every block of `student` use the attention of `teacher` for the same images, in place; returns the student.

    Student block i of L takes teacher block i·T // L of T, student head h of H the teacher head h·T // H of T: the same
    ones where depths and heads agree, each repeated where the student has more (Tiny's 3 heads into Base's 12: each
    four times). Queries and keys of the student are removed; what remains learns. The teacher, of any kind of
    attention that `karat.record` knows, is frozen.

    Args:
        student: a model whose attention `karat.karatize` would serve, not converted itself.
        teacher: the trained model.
        example: images (1,C,S,S) that both take, to compare their tokens with.

    Raises:
        ValueError: a student that is its own teacher, one without attention or with a learnable one, images that the
            teacher can't take, numbers of tokens that differ, or a number of student heads that the teacher's does not
            divide.

    >>> import karat
    >>> teacher = karat.create_model("vit_tiny_patch16_224", "g3b", img_size=32, depth=2)
    >>> student = karat.create_model("vit_small_patch16_224", img_size=32, depth=4)
    >>> student = transfer_attention(student, teacher, torch.zeros(1, 3, 32, 32))
    >>> student(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 1000])
    """
    if student is teacher:
        raise ValueError("student and teacher are one model, which needs its attention: give copy.deepcopy(teacher)")
    sites = attention_sites(student)
    stranger = next((site for site in sites if type(site.module) in OWN), None)
    if stranger is not None and stranger.kind.learned:
        raise ValueError("the student's own attention is not used: build it with attention='softmax'")
    if not sites or stranger is not None:
        raise ValueError(f"{type(student).__name__} has no attention that another can take the place of")
    teacher.eval().requires_grad_(False)
    theirs, mine = _taken(teacher, example), look(student, example)
    names = list(theirs)
    pairs = [(site, names[i * len(names) // len(sites)]) for i, site in enumerate(sites)]
    for site, source in pairs:
        _check(site.name, mine[site.name].attention, source, theirs[source].attention)
    blocks = [
        TaughtBlock(TransferredAttention(site.module, site.kind.values(site.module)), source) for site, source in pairs
    ]
    exchange(student, {site.module: block.attention for (site, _), block in zip(pairs, blocks, strict=True)})
    hooks = TeacherHooks(teacher, blocks)
    student.register_forward_pre_hook(hooks.begin, with_kwargs=True)
    student.register_forward_hook(hooks.end)
    return student


def teacher_of(student: nn.Module) -> nn.Module | None:
    """The teacher of a model made by `transfer_attention`; None of any other."""
    hooks = [getattr(hook, "__self__", None) for hook in student._forward_pre_hooks.values()]
    return next((hook.teacher for hook in hooks if isinstance(hook, TeacherHooks)), None)


def _taken(teacher: nn.Module, example: Tensor) -> dict[str, Intermediate]:
    try:
        return look(teacher, example)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the teacher can't take the student's images {tuple(example.shape)}: {first_line(error)}"
        ) from None


def _check(name: str, mine: Tensor, source: str, theirs: Tensor) -> None:
    """Raises ValueError where attention `theirs` can't stand in the place of `mine`, (B,H,N,N) each."""
    if mine.shape[0] != theirs.shape[0] or mine.shape[-1] != theirs.shape[-1]:
        raise ValueError(
            f"the student's {name} has {mine.shape[-1]} tokens, the teacher's {source} {theirs.shape[-1]}: give the "
            "student the teacher's --img-size and --patch-size, and a backbone with the same class token or windows"
        )
    if mine.shape[1] % theirs.shape[1]:
        raise ValueError(
            f"the student's {name} has {mine.shape[1]} heads, the teacher's {source} {theirs.shape[1]}: give a student "
            f"with a multiple of {theirs.shape[1]} heads"
        )
