"""What a run says of itself: a line of numbers for each epoch, and its summary."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from karat.runs.settings import RunSettings
from karat.train import memory
from karat.train.snapshot import Progress


def epoch_line(
    progress: Progress,
    measured: Mapping[str, float],
    *,
    lr: float = 0.0,
    images: int = 0,
    bad_images: int = 0,
    step_seconds: Sequence[float] = (),
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The epoch that `progress` has just ended, as metrics.jsonl has it; `measured` is what its evaluation gave.

    images: of an epoch's training. step_seconds: of this epoch's updates since the start or the resumption. device: on
    which it was computed; None: the CPU.
    """
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": lr,
        "train_loss": progress.loss_sum / progress.applied if progress.applied else math.nan,
        **measured,
        "seconds": progress.seconds,
        "ms_per_step": 1e3 * statistics.median(step_seconds or [0.0]),
        "images_per_second": images / max(progress.seconds, 1e-9),
        "peak_memory_mib": memory.peak_mib(device or torch.device("cpu")),
        "grad_norm": progress.largest_norm,
        "bad_steps": progress.bad_steps,
        "bad_images": bad_images,
    }


def summary(
    folder: Path,
    settings: RunSettings,
    figures: Mapping[str, Any],
    parameters: int,
    progress: Progress,
    *,
    finished: bool,
) -> dict[str, Any]:
    """The run as it stands, as summary.json has it; `figures` are those of its last epoch."""
    trained = [line for line in progress.history if line["epoch"]]  # a converted run has a line of epoch 0 alone
    return {
        "folder": os.fspath(folder),
        "model": settings.model,
        "attention": settings.attention,
        "seed": settings.seed,
        "epochs": progress.epoch,
        "finished": finished,
        "parameters": parameters,
        **figures,
        "best": progress.best,
        # the median: the first epoch also pays for what torch and kernels set up once
        "seconds_per_epoch": statistics.median([line["seconds"] for line in trained] or [0.0]),
        # resumed at an epoch's end, that epoch has no step of its own
        "ms_per_step": statistics.median([t for line in trained if (t := line.get("ms_per_step"))] or [0.0]),
        "peak_memory_mib": max((line["peak_memory_mib"] for line in progress.history), default=0.0),
    }
