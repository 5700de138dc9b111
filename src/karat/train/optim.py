"""Optimiser and schedule, from timm's factories, with the operator's parameters in groups of their own.

The rule for KArAt's parameters (basis coefficients, W and C, edge scales, gates): no weight decay unless
`coefficient_weight_decay` asks for it, because decay pulls every edge function towards zero, and with it the whole
attention; and the learning rate of the rest times `operator_lr_scale`, a ratio that the schedule keeps. Biases, norms
and what a model lists in `no_weight_decay()` are not decayed either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from karat.data.loader import Loader
from karat.errors import first_line
from karat.operator.operator import KArAtOperator
from karat.runs.checkpoint import pack_optimizer, unpack_optimizer
from karat.runs.optimisation import Optimisation
from karat.runs.settings import RunSettings

MOST = 10.0  # times the rate of the rest that the operators may learn at without a word
STEP_EPOCHS = 90  # timm's: under sched step the rate falls tenfold every so many epochs


def operator_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable parameters of every KArAt operator in `model`, each once, by name."""
    owned = {id(p) for m in model.modules() if isinstance(m, KArAtOperator) for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in owned}


def parameter_groups(model: nn.Module, recipe: Optimisation) -> list[dict[str, Any]]:
    """Groups for the optimiser: decayed, not decayed, by layer where `layer_decay` is set, and the operator's own."""
    own = operator_parameters(model)
    listed = getattr(model, "no_weight_decay", set)
    keep = set(own) | set(listed())
    if recipe.layer_decay is None:
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=keep)
    else:
        groups = param_groups_layer_decay(
            model, recipe.weight_decay, no_weight_decay_list=keep, layer_decay=recipe.layer_decay
        )
    owned = {id(p) for p in own.values()}
    split: list[dict[str, Any]] = []
    for group in groups:
        facts = {key: value for key, value in group.items() if key in ("weight_decay", "lr_scale")}
        rest = [p for p in group["params"] if id(p) not in owned]
        mine = [p for p in group["params"] if id(p) in owned]
        if rest:
            split.append(facts | {"params": rest})
        if mine:
            scale = facts.get("lr_scale", 1.0) * recipe.operator_lr_scale
            split.append({"params": mine, "weight_decay": recipe.coefficient_weight_decay, "lr_scale": scale})
    return split


def create_optimizer(
    model: nn.Module, recipe: Optimisation, total_batch: int, device: torch.device | str = "cpu"
) -> torch.optim.Optimizer:
    """timm's optimiser `recipe.opt` at the rate of the recipe's rule; `device` is where the model will be trained.

    Raises ValueError when timm has no such optimiser, or a run with it could not be saved and gone on with.
    """
    counter = _try_out(recipe, total_batch, torch.device(device))
    optimizer = _create(parameter_groups(model, recipe), recipe, total_batch)
    if counter is not None:
        for group in optimizer.param_groups:
            group["step"] = counter * 0
    return optimizer


def _create(parameters: Any, recipe: Optimisation, total_batch: int) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        parameters,
        opt=recipe.opt,
        lr=recipe.scaled_lr(total_batch),
        weight_decay=recipe.weight_decay,
        eps=recipe.opt_eps,
        betas=recipe.opt_betas,
    )


def _try_out(recipe: Optimisation, total_batch: int, device: torch.device) -> Any:
    """Step a few small tensors, save and restore as a run does, and step on: both ways must come to the same bits.

    Better now than at the end of an epoch: some optimisers keep what safetensors can't hold, or where no file sees it.
    Gives the number in which the optimiser counts the steps of a whole group; None where it counts otherwise.
    """
    # the matrix is large enough for those that keep rows and columns in place of large ones
    shapes = {"matrix": (40, 48), "vector": (6,), "stack": (2, 3, 4), "kernel": (4, 3, 2, 2)}

    def start(source: dict[str, nn.Parameter] | None = None) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        values = {n: torch.ones(s, device=device) if source is None else source[n].detach() for n, s in shapes.items()}
        own = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        return own, _create(list(own.values()), recipe, total_batch)

    def step(own: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        for parameter in own.values():
            parameter.grad = torch.linspace(-1, number, parameter.numel(), device=device).view_as(parameter)
        optimizer.step()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            first, optimizer = start()
            for number in (1, 2, 3):
                step(first, optimizer, number)
            second, restored = start(first)
            packed = pack_optimizer(optimizer, {parameter: name for name, parameter in first.items()})
            copied = {name: value.clone() for name, value in packed.items()}
            unpack_optimizer(restored, {parameter: name for name, parameter in second.items()}, copied)
            for own, one in ((first, optimizer), (second, restored)):
                step(own, one, 4)
            same = all(torch.equal(first[name], second[name]) or not first[name].isfinite().all() for name in shapes)
        except Exception as error:  # whatever a stranger's optimiser says of tensors as these
            raise ValueError(f"opt={recipe.opt!r} can't be used here: {first_line(error)}; take e.g. adamw") from None
    if not same:
        raise ValueError(f"opt={recipe.opt!r} keeps what a checkpoint doesn't see: no run could go on; take e.g. adamw")
    return optimizer.param_groups[0].get("step")


def create_schedule(optimizer: torch.optim.Optimizer, recipe: Optimisation, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped per update: it is a function of the number of updates and keeps no state.

    Raises ValueError for a schedule that timm doesn't have or steps by epochs only, and a milestone inside a warm-up
    that comes before it.
    """
    total = recipe.epochs * updates_per_epoch
    warmup = min(math.ceil(recipe.warmup_epochs * updates_per_epoch), max(total - 1, 0))
    milestones = _milestones(recipe, total, warmup)
    step: Any = {"decay_epochs": STEP_EPOCHS * updates_per_epoch} if recipe.sched == "step" else {}
    why = "is no schedule"
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.sched,
            # timm's decay would end beyond the run
            num_epochs=max(total - warmup if recipe.warmup_prefix else total, 1),
            warmup_epochs=warmup,
            warmup_prefix=recipe.warmup_prefix,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            decay_milestones=milestones,
            step_on_epochs=False,
            updates_per_epoch=1,
            **step,
        )
    except (AssertionError, ValueError) as error:
        scheduler, why = None, f"can't be used ({first_line(error).rstrip('.')})"
    if scheduler is None:
        raise ValueError(f"sched {recipe.sched!r} {why}: use cosine, or constant for an unchanging rate")
    return scheduler


def base_rate(optimizer: torch.optim.Optimizer) -> float:
    """The present rate of the parameters that have neither layer decay nor a factor of their own."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def rate_notes(schedule: Scheduler, settings: RunSettings, batches: Loader, *, operators: bool) -> Iterator[str]:
    """What there is to say of a rate that may not be what was meant. operators: whether the model has some."""
    recipe, accumulated = settings.recipe, settings.grad_accum_steps
    if operators and recipe.operator_lr_scale > MOST:
        yield (
            f"the operators learn at {recipe.operator_lr_scale:.0f} times the rate of the rest (--operator-lr-scale): "
            "watch operator_growth"
        )
    if recipe.warmup_epochs > recipe.epochs:
        yield (
            f"the warm-up of {recipe.warmup_epochs:g} epochs is longer than the run of {recipe.epochs}: the rate only "
            "rises; lower --warmup-epochs"
        )
    peak, ends = schedule.base_values[0], []
    for update in (0, recipe.epochs * -(-len(batches) // accumulated) - 1):
        schedule.step_update(update)
        ends.append(base_rate(schedule.optimizer))
    if max(ends) > 1.001 * peak:
        yield (
            f"the learning rate begins at {ends[0]:.3g} and ends at {ends[1]:.3g}, its peak is {peak:.3g}: raise --lr "
            "or the batch, or lower --warmup-lr and --min-lr"
        )
    asked, found = recipe.batch_size * accumulated, batches.batch_size * min(accumulated, len(batches))
    if recipe.scaled_lr(asked) >= 2 * recipe.scaled_lr(found):
        yield (
            f"the learning rate is for updates of {asked} images a process, and the data gives {found}: lower "
            "--batch-size, --grad-accum-steps or --lr"
        )


def _milestones(recipe: Optimisation, total: int, warmup: int) -> list[int]:
    """Of multistep alone: the updates after which the rate falls, counted as timm does, from the prefix's end."""
    steps = [math.ceil(share * total) for share in recipe.milestones]
    if recipe.sched != "multistep" or not recipe.warmup_prefix:
        return steps
    if steps and steps[0] <= warmup:
        raise ValueError(
            f"milestones={recipe.milestones}: the rate would fall at update {steps[0]}, inside the warm-up of {warmup} "
            "that comes first (warmup_prefix); give later milestones or fewer warmup_epochs"
        )
    return [step - warmup for step in steps]
