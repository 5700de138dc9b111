"""What a run says of itself: a line of numbers for each epoch, and its summary."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karat.runs.settings import RunSettings
from karat.train import memory
from karat.train.build import Parts
from karat.train.snapshot import Progress
from karat.train.task import Task


def epoch_line(
    progress: Progress, parts: Parts, data: Any, measured: dict[str, float], step_seconds: Sequence[float]
) -> dict[str, Any]:
    """The epoch that `progress` has just ended, as metrics.jsonl has it; `measured` is what its evaluation gave.

    step_seconds: of this epoch's updates since the start or the resumption.
    """
    own = {"operator_gradient_norm": progress.largest_operator_norm} if parts.watch.operators else {}
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "train_loss": progress.loss_sum / max(progress.applied, 1),
        **measured,
        "seconds": progress.seconds,
        "ms_per_step": 1e3 * statistics.median(step_seconds or [0.0]),
        "images_per_second": data.train.num_samples / max(progress.seconds, 1e-9),
        "peak_memory_mib": memory.peak_mib(parts.accelerator.device),
        "grad_norm": progress.largest_norm,
        **own,
        "bad_steps": progress.bad_steps,
        "bad_images": data.bad_images,
    }


def summary(folder: Path, settings: RunSettings, task: Task, parts: Parts, progress: Progress) -> dict[str, Any]:
    """The run as it stands, as summary.json has it."""
    history = progress.history
    return {
        "folder": os.fspath(folder),
        "model": settings.model,
        "attention": settings.attention,
        "seed": settings.seed,
        "epochs": progress.epoch,
        "finished": progress.epoch >= settings.recipe.epochs,
        "parameters": parts.parameters,
        **task.summary(history),
        "best": progress.best,
        # the median: the first epoch also pays for what torch and kernels set up once
        "seconds_per_epoch": statistics.median([line["seconds"] for line in history] or [0.0]),
        # resumed at an epoch's end, that epoch has no step of its own
        "ms_per_step": statistics.median([t for line in history if (t := line.get("ms_per_step"))] or [0.0]),
        "peak_memory_mib": max((line["peak_memory_mib"] for line in history), default=0.0),
    }
