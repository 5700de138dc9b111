"""A student with learnable attention fitted to its softmax teacher, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from karat.models.attention import AttentionInputs
from karat.models.distill import gauge
from karat.models.distill.closed_form import Rows, check_fits, fit_operator
from karat.models.distill.least_squares import Moments, least_squares
from karat.models.distill.sites import Site, arguments_at, sites
from karat.models.evaluating import evaluating
from karat.operator.operator import KArAtOperator

Images = Callable[[], Iterable[Tensor]]

SCALES = (0.25, 0.5, 0.75, 1.0)  # of the reach, tried on the first batches
TRIAL_BATCHES = 2


@dataclass(frozen=True)
class FitOptions:
    """How operators are fitted in closed form.

    Args:
        ridge: λ of the regressions, as a share of the mean feature's power.
        fold: centre and scale the scores through the student's qkv (see `karat.models.distill.gauge`).
        refit_projection: also fit each attention's output projection, by least squares, to the teacher's output, so
            that a block makes up for what the blocks before it lost.
    """

    ridge: float = 1e-4
    fold: bool = True
    refit_projection: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < 1:
            raise ValueError(f"ridge must lie in [0, 1), got {self.ridge}")


@torch.no_grad()
def fit_operators(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    options: FitOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Fit each operator of `student` to the softmax of `teacher`, in place; returns the student (SPEC §1, §8).

    The student is the teacher with its attention converted (`karat.karatize`): same names, same weights elsewhere.
    Blocks are fitted in forward order, each on the tokens that reach it in the student as fitted so far; an operator
    that blocks share is fitted once, on the teacher's tokens in all of them. Where the attention begins as softmax
    (residual="softmax" with a learned gate, or with init_scale=0) the student is its teacher already and stays so.

    Args:
        student, teacher: models on one device; they run in evaluation mode.
        images: gives batches (B,C,height,width), the same ones each time it's called.
        progress: told each block's name.

    Raises ValueError for models that don't fit each other, attention without a closed form, and no images.
    """
    options = options or FitOptions()
    places = sites(student, teacher)
    check_fits(places[0].operator.config)
    if places[0].operator.config.begins_as_softmax:
        return student
    if next(iter(images()), None) is None:
        raise ValueError("there are no images to fit to: give at least one")
    shared = _by_operator(places)
    with evaluating(student), evaluating(teacher):
        for op, users in shared.items():
            source = teacher if len(users) > 1 else student
            if options.fold:
                _fold(op, users, source, images, options)
            fit_operator(op, partial(_rows, op, users, source, images), options.ridge)
            for site in users if options.refit_projection else []:
                refit_projection(site, student, teacher, images, options.ridge)
            if progress is not None:
                progress(users[0].name if len(users) == 1 else f"{len(users)} blocks")
    return student


def _by_operator(places: list[Site]) -> dict[KArAtOperator, list[Site]]:
    found: dict[KArAtOperator, list[Site]] = {}
    for site in places:
        found.setdefault(site.operator, []).append(site)
    return found


def _inputs(
    users: list[Site], source: nn.Module, images: Images, most: int | None = None
) -> Iterator[tuple[Site, AttentionInputs, AttentionInputs]]:
    """(site, student's inputs, teacher's inputs) for every batch and site, on the tokens that reach it in `source`."""
    for site in users:
        inside = source.get_submodule(site.name)
        for number, batch in enumerate(images()):
            if most is not None and number >= most:
                break
            yield site, *site.read(arguments_at(source, inside, batch))


def _rows(
    op: KArAtOperator,
    users: list[Site],
    source: nn.Module,
    images: Images,
    scale: Tensor | None = None,
    most: int | None = None,
) -> Iterator[Rows]:
    heads = list(op.karat_heads)
    for _, mine, theirs in _inputs(users, source, images, most):
        scores = mine.scores[:, heads]
        mask = mine.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        yield Rows(
            scores if scale is None else scores * scale[heads][:, None, None].to(scores),
            theirs.softmax[:, heads],
            theirs.v[:, heads],
            None if mask is None else mask.expand(*mask.shape[:2], *scores.shape[2:]),
        )


def _fold(op: KArAtOperator, users: list[Site], source: nn.Module, images: Images, options: FitOptions) -> None:
    """Choose shift and scale of the scores, head by head, by what the closed form explains on the first batches."""
    if not all(gauge.can_fold(site.student) for site in users):
        return
    heads = list(op.karat_heads)
    for site in users:
        seen = [mine for _, mine, _ in _inputs([site], source, images, TRIAL_BATCHES)]
        gauge.shift_keys(site.student, gauge.key_shift(seen), heads)
    seen = [mine for _, mine, _ in _inputs(users, source, images, TRIAL_BATCHES)]
    whole = gauge.score_scale(seen, op.edge_layers[0].basis.reach)
    shares = []
    for factor in SCALES:
        trial = partial(_rows, op, users, source, images, whole * factor, TRIAL_BATCHES)
        shares.append(fit_operator(op, trial, max(options.ridge, 1e-4)))
    best = torch.stack(shares).argmax(0)  # (H',)
    scale = torch.ones_like(whole)
    scale[heads] = whole[heads] * torch.tensor(SCALES).to(whole)[best]
    for site in users:
        gauge.scale_queries(site.student, scale, heads)


@torch.no_grad()
def refit_projection(site: Site, student: nn.Module, teacher: nn.Module, images: Images, ridge: float) -> None:
    """Fit the output projection of the student's attention, by least squares, to what the teacher's attention gives.

    The student's heads see the student's tokens, the teacher's its own.
    """
    projection = site.student.proj
    moments: Moments | None = None
    heads: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    try:
        for batch in images():
            heads.clear()
            mine = arguments_at(student, site.student, batch)
            site.student(*mine.args, **mine.kwargs)
            theirs = arguments_at(teacher, site.teacher, batch)
            y = site.teacher(*theirs.args, **theirs.kwargs)
            z = heads[-1].reshape(-1, heads[-1].shape[-1])
            if projection.bias is not None:
                z = torch.cat([z, torch.ones_like(z[:, :1])], dim=-1)
            if moments is None:
                moments = Moments.zeros(1, z.shape[-1], y.shape[-1])
            moments.add(0, z, y.reshape(len(z), -1))
    finally:
        handle.remove()
    assert moments is not None
    # shrunk towards the projection that is there: with few images it stays
    there = projection.weight
    if projection.bias is not None:
        there = torch.cat([there, projection.bias[:, None]], dim=1)
    start = there.T.to(moments.gram)  # (C+1,C), or (C,C) without a bias
    change = least_squares(moments.gram[0], moments.without(start[None])[0], max(ridge, 1e-4))
    fitted = (start + change).T.to(projection.weight)
    projection.weight.copy_(fitted[:, : projection.in_features])
    if projection.bias is not None:
        projection.bias.copy_(fitted[:, -1])
