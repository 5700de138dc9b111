"""Attention transfer: a student runs on its teacher's attention and learns all the rest (SPEC §4, Table 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.convit import GPSA
from torch import Tensor, nn

from karat.models.attention import ADAPTERS, CONVERTED
from karat.models.karatize import attention_sites
from karat.models.record import READERS, Intermediate, record

STUDENTS = (*ADAPTERS, GPSA)  # kinds of attention that can be given another's


class TransferredAttention(nn.Module):
    """The value path of an attention module, mixed by an attention that is handed in.

    x (B,N,C) -> proj(gate · norm(concat_h σ_t(h) v_h)) with v = x W_v; σ (B,T,N,N) has the teacher's T heads, and
    student head h of H takes teacher head t(h) = h·T // H. The replaced module's queries and keys are gone; its values'
    weights, projection, dropouts, inner norm and gate are taken over.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.v = value_path(attn)
        self.attn_drop, self.proj, self.proj_drop = attn.attn_drop, attn.proj, attn.proj_drop
        self.norm = getattr(attn, "norm", nn.Identity())
        self.gate: nn.Module | None = getattr(attn, "gate", None)
        self.given: Intermediate | None = None  # of the present batch, set by Lesson
        self.train(attn.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B,N,C) -> (B,N,C); masks are the teacher's matter. Raises ValueError where no attention fits x."""
        if self.given is None:
            raise ValueError("no teacher has looked at these images: call the model itself, not a part of it")
        sigma = self.given.attention
        if sigma.shape[0] != x.shape[0] or sigma.shape[-1] != x.shape[1]:
            raise ValueError(
                f"the teacher's attention is for {sigma.shape[0]} x {sigma.shape[-1]} tokens, the student has "
                f"{x.shape[0]} x {x.shape[1]}"
            )
        v = self.v(x)  # (B,N,H·D); the H/T student heads of one teacher head lie side by side
        v = v.unflatten(-1, (sigma.shape[1], -1)).transpose(1, 2)  # (B,T,N,H·D/T)
        out = (self.attn_drop(sigma.to(v.dtype)) @ v).transpose(1, 2).flatten(2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def value_path(attn: Any) -> nn.Linear:
    """The values' linear map of an attention module: GPSA's own, the last third of a fused qkv (a copy)."""
    if isinstance(attn, GPSA):
        return attn.v
    qkv: nn.Linear = attn.qkv
    width, bias = qkv.out_features // 3, qkv.bias is not None
    like = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
    v: nn.Linear = nn.utils.skip_init(nn.Linear, qkv.in_features, width, bias=bias, **like)
    with torch.no_grad():
        v.weight.copy_(qkv.weight[2 * width :])
        if bias:
            v.bias.copy_(qkv.bias[2 * width :])
    return v


class Seat(NamedTuple):
    """A student's attention module and the name of the teacher's that it is given."""

    attention: TransferredAttention
    source: str


class Lesson:
    """What happens around each forward pass of a student: the teacher looks at the images first.

    The teacher is no submodule: it is neither trained nor saved with the student, and stays in float32 and evaluation
    mode whatever the student does.
    """

    def __init__(self, teacher: nn.Module, seats: list[Seat]) -> None:
        self.teacher, self.seats = teacher, seats

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def begin(self, student: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hand the teacher's attention for these images to every block."""
        like = next(self.teacher.parameters())
        if like.device != args[0].device:
            self.teacher.to(args[0].device)
        with torch.autocast(args[0].device.type, enabled=False):  # the student's precision is not the teacher's
            seen = look(self.teacher, args[0].to(like.dtype))
        for seat in self.seats:
            seat.attention.given = seen[seat.source]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def end(self, student: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        """Take it back, so that it is never mixed up with other images (training needs it for the backward pass)."""
        if not student.training:
            for seat in self.seats:
                seat.attention.given = None


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
        ValueError: a student without attention or with a learnable one, images that the teacher can't take, numbers of
            tokens that differ, or a number of student heads that the teacher's does not divide.

    >>> import karat
    >>> teacher = karat.create_model("vit_tiny_patch16_224", "g3b", img_size=32, depth=2)
    >>> student = karat.create_model("vit_small_patch16_224", img_size=32, depth=4)
    >>> student = transfer_attention(student, teacher, torch.zeros(1, 3, 32, 32))
    >>> student(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 1000])
    """
    sites = attention_sites(student)
    stranger = next((site for site in sites if not isinstance(site.module, STUDENTS)), None)
    if stranger is not None and isinstance(stranger.module, CONVERTED):
        raise ValueError("the student's own attention is not used: build it with attention='softmax'")
    if not sites or stranger is not None:
        raise ValueError(f"{type(student).__name__} has no attention that another can take the place of")
    teacher.eval().requires_grad_(False)
    theirs, mine = _taken(teacher, example), look(student, example)
    names = list(theirs)
    pairs = [(site, names[i * len(names) // len(sites)]) for i, site in enumerate(sites)]
    for site, source in pairs:
        _check(site.name, mine[site.name].attention, source, theirs[source].attention)
    seats = []
    for site, source in pairs:
        seats.append(Seat(TransferredAttention(site.module), source))
        parent, _, child = site.name.rpartition(".")
        setattr(student.get_submodule(parent), child, seats[-1].attention)
    lesson = Lesson(teacher, seats)
    student.register_forward_pre_hook(lesson.begin)
    student.register_forward_hook(lesson.end)
    return student


def teacher_of(student: nn.Module) -> nn.Module | None:
    """The teacher of a model made by `transfer_attention`; None of any other."""
    hooks = [getattr(hook, "__self__", None) for hook in student._forward_pre_hooks.values()]
    return next((hook.teacher for hook in hooks if isinstance(hook, Lesson)), None)


def _taken(teacher: nn.Module, example: Tensor) -> dict[str, Intermediate]:
    try:
        return look(teacher, example)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the teacher can't take the student's images {tuple(example.shape)}: {reason}") from None


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


def _given(attn: Any, *args: Any, **kwargs: Any) -> Intermediate:
    """What `karat.record` hands out for a student's block: the teacher's scores and attention."""
    assert attn.given is not None
    return attn.given


READERS[TransferredAttention] = _given
