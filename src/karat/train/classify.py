"""Classification as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn

from karat.data.splits import Data, Opener, load_data
from karat.runs.classification import Settings
from karat.runs.model import data_options, plain_model, with_teacher
from karat.train import transfer
from karat.train.build import create_loss, create_mixup, mix
from karat.train.evaluate import evaluate
from karat.train.init import Transplanted, load_init
from karat.train.task import Batch, Objective, Task


@dataclass
class _MixedLoss:
    """Images mixed, forward, cross-entropy."""

    mixup: Mixup | None
    loss: nn.Module
    channels_last: bool

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        images, targets = mix(self.mixup, images, labels)
        loss: Tensor = self.loss(model(images), targets)
        return loss


class Classification(Task):
    """Images to classes: batches (B,C,S,S) and labels (B,); measured by top-1.

    opened: what may have opened the data before.
    """

    metric = "top1"

    def __init__(self, settings: Settings, opened: Opener | None = None) -> None:
        self.settings, self.opened = settings, opened

    def load_data(self, accelerator: Accelerator) -> Data:
        """As Task.load_data."""
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        return load_data(data_options(self.settings, **share), self.opened)

    def facts(self, data: Data) -> dict[str, Any]:
        """As Task.facts."""
        return {"num_classes": data.num_classes, "class_names": list(data.class_names), "in_chans": data.in_chans}

    def build(self, data: Data, folder: Path | None) -> tuple[nn.Module, list[Transplanted]]:
        """As Task.build."""
        model = plain_model(self.settings, data.num_classes, data.in_chans)
        loaded = [] if self.settings.init is None else load_init(model, self.settings)
        model = with_teacher(model, self.settings, data.in_chans, folder)
        if self.settings.channels_last:
            model.to(memory_format=torch.channels_last)
        return model, loaded

    def keep(self, folder: Path) -> None:
        """The teacher of a student."""
        if self.settings.teacher is not None:
            transfer.keep(self.settings, folder)

    def objective(self, data: Data) -> Objective:
        """As Task.objective."""
        recipe = self.settings.recipe
        return _MixedLoss(create_mixup(recipe, data.num_classes), create_loss(recipe), self.settings.channels_last)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, data: Data
    ) -> dict[str, float]:
        """As Task.evaluate."""
        return evaluate(model, batches, accelerator)

    def epoch_line(self, line: Mapping[str, Any]) -> str:
        """As Task.epoch_line."""
        ema = f"  EMA {line['ema_top1']:.2f} %" if "ema_top1" in line else ""
        return f"eval {line['eval_loss']:.4f}  top-1 {line['top1']:.2f} %{ema}"

    def summary(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """As Task.summary."""
        return {name: history[-1][name] if history else None for name in ("top1", "top5")}
