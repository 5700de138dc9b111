"""Layer-wise distillation: every attention of the student learns to give what the teacher's gives, each on its own.

No gradient passes between blocks. A block's input is either the teacher's tokens, or the student's own, so that it also
learns to make up for the blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat.models.distill.sites import Site, sites, watching
from karat.models.evaluating import evaluating

INPUTS = ("student", "teacher")
SCOPES = ("operator", "attention")


@dataclass(frozen=True)
class DistillOptions:
    """How the student's attentions are trained.

    Args:
        epochs: passes over the images; 0 trains nothing.
        lr: peak rate of Adam, cosine to zero.
        scope: what is trained, the "operator" or the whole "attention" (qkv and projection too).
        inputs: whose tokens the student's attention sees, "student" or "teacher".

    Raises ValueError for values that aren't these.
    """

    epochs: int = 1
    lr: float = 1e-3
    scope: str = "operator"
    inputs: str = "student"

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"distill epochs must be >= 0, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"distill lr must be > 0, got {self.lr}")
        for name, value, known in (("scope", self.scope, SCOPES), ("inputs", self.inputs, INPUTS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")


def distill(
    student: nn.Module,
    teacher: nn.Module,
    images: Callable[[], Iterable[Tensor]],
    options: DistillOptions,
    *,
    batches: int,
    progress: Callable[[str], None] | None = None,
) -> list[float]:
    """Train the attentions of `student` in place; returns the mean relative error of each epoch.

    The loss is Σ over blocks of |student's attention output - teacher's|² / |teacher's|², projection included.

    Args:
        student, teacher: models on one device; they run in evaluation mode. The student's parameters keep their
            requires_grad.
        images: gives the batches of an epoch.
        batches: how many it gives, for the schedule.

    Raises ValueError for models that don't fit each other.
    """
    places = sites(student, teacher)
    if options.epochs == 0:
        return []
    trained = list({id(p): p for site in places for p in _parameters(site, options.scope)}.values())
    optimizer = torch.optim.Adam(trained, lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.epochs * batches))
    errors = []
    for epoch in range(options.epochs):
        total, seen = 0.0, 0
        for batch in images():
            with evaluating(student), evaluating(teacher):
                loss = _loss(student, teacher, places, batch, options.inputs)
            optimizer.zero_grad(set_to_none=True)
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            total, seen = total + loss.item() / len(places), seen + 1
        if seen == 0:
            raise ValueError("there are no images to distil on: give at least one")
        errors.append(total / seen)
        if progress is not None:
            progress(f"epoch {epoch + 1}/{options.epochs}, mean error {errors[-1]:.4f}")
    optimizer.zero_grad(set_to_none=True)
    return errors


def _parameters(site: Site, scope: str) -> list[nn.Parameter]:
    chosen = list(site.operator.parameters())
    if scope == "attention":
        chosen += site.student.parameters()
    return [parameter for parameter in chosen if parameter.requires_grad]


def _loss(student: nn.Module, teacher: nn.Module, places: list[Site], batch: Tensor, inputs: str) -> Tensor:
    with torch.no_grad(), watching([site.teacher for site in places]) as theirs:
        teacher(batch)
    if inputs == "student":
        with torch.no_grad(), watching([site.student for site in places]) as mine:
            student(batch)
    losses = []
    for site in places:
        call, target = theirs[site.teacher]
        if inputs == "student":
            call = mine[site.student][0]
        out = site.student(*call.args, **call.kwargs)
        losses.append((out - target).square().sum() / target.square().sum().clamp(min=1e-12))
    return torch.stack(losses).sum()
