"""One update: forward, backward, clipping, and the decision whether its numbers may touch the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate.utils import send_to_device

from karat.train.build import Parts
from karat.train.task import Batch
from karat.train.watch import burst_warning, clip_factor, whole


def chunks(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches, the last one shorter where they do not divide."""
    while chunk := list(islice(batches, size)):
        yield chunk


@dataclass(frozen=True)
class Outcome:
    """What an update did: the mean training loss, the gradient's norm before clipping, and whether it counted."""

    loss: float
    norm: float
    applied: bool
    fault: bool  # not applied because a number was not finite (fp16's scale overflowing is no fault)
    operator_norm: float = 0.0  # that of the operators' part of the gradient
    note: str | None = None  # what there is to say of it


def update(parts: Parts, step: int, group: list[Batch]) -> Outcome:
    """Update the weights from a group of batches whose gradients are averaged; a non-finite one leaves them alone.

    So it does the running statistics of layers that keep such. Where nothing was applied the gradients stay in place,
    for a diagnosis; the next update clears them.

    Args:
        step: how many updates came before, which fixes the learning rate.
        group: batches as the run's task has them.
    """
    accelerator, recipe = parts.accelerator, parts.settings.recipe
    parts.optimizer.zero_grad()
    parts.schedule.step_update(step)
    losses, statistics = [], [tensor.clone() for tensor in parts.statistics]
    for index, batch in enumerate(group):
        moved = send_to_device(batch, accelerator.device, non_blocking=True)
        last = index == len(group) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(parts.model):
            loss = parts.objective(parts.model, moved)
            accelerator.backward(loss / len(group))
        losses.append(loss.detach())
    limit = recipe.clip_grad if recipe.clip_grad is not None else math.inf
    norm = accelerator.clip_grad_norm_(parts.model.parameters(), limit)
    mean = torch.stack(losses).mean()
    if accelerator.num_processes > 1:
        mean = accelerator.reduce(mean, "mean")
    measured = [mean.float(), whole(norm).float(), *parts.watch.operator_norm()]
    loss_value, norm_value, *operators = torch.stack(measured).tolist()  # the one time that the device is waited for
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        factor = clip_factor(norm_value, recipe.clip_grad)
        own = operators[0] / factor if operators else 0.0
        median = parts.watch.burst(norm_value, own, factor)
        if median is not None and recipe.clip_grad is not None:
            parts.watch.clip_apart(recipe.clip_grad, factor)
        parts.optimizer.step()
        if parts.ema is not None:
            parts.ema.update()
        note = None if median is None else burst_warning(step, norm_value, median, recipe)
        return Outcome(loss_value, norm_value, applied=True, fault=False, operator_norm=own, note=note)
    for tensor, before in zip(parts.statistics, statistics, strict=True):
        tensor.copy_(before)
    scaler = accelerator.scaler
    harmless = scaler is not None and math.isfinite(loss_value) and scaler.get_scale() > 1
    if scaler is not None:
        scaler.update()  # it noted the overflow when the gradients were unscaled, and lowers its scale
    return Outcome(loss_value, norm_value, applied=False, fault=not harmless)


def bad_gradients(parts: Parts) -> list[str]:
    """The parameters whose gradient of the last update is not finite, in the model's order."""
    named = parts.bare.named_parameters()
    return [name for name, p in named if p.grad is not None and not torch.isfinite(whole(p.grad)).all()]
