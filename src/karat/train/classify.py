"""Classification as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from karat import runs
from karat.data.labels import check_unchanged
from karat.data.splits import Data, Opener
from karat.runs.classification import Settings, resolve
from karat.runs.model import class_names, data_options, plain_model, with_teacher
from karat.runs.recipes import Recipe
from karat.train import transfer
from karat.train.engine import Trainer
from karat.train.evaluate import evaluate
from karat.train.init import Transplanted, load_init
from karat.train.task import Batch, Objective, Task


def create_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None when both alphas are 0. ValueError for an odd batch, which it can't pair."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    if recipe.batch_size % 2:
        raise ValueError(f"batch_size={recipe.batch_size}: mixup and cutmix pair images and need an even batch")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def create_loss(recipe: Recipe) -> nn.Module:
    """Cross-entropy for training: with soft targets under mixing, with smoothing otherwise."""
    if recipe.mixup or recipe.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()


def mix(mixup: Mixup | None, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch and its targets, mixed where mixing is on; a last odd batch leaves its final image out."""
    if mixup is None:
        return images, labels
    even = len(images) // 2 * 2
    if even == 0:
        return images, nn.functional.one_hot(labels, mixup.num_classes).to(images.dtype)
    mixed: tuple[Tensor, Tensor] = mixup(images[:even].clone(), labels[:even])
    return mixed


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


class Classification(Task[Settings, Data]):
    """Images to classes: batches (B,C,S,S) and labels (B,); measured by top-1.

    opened: opens the data, or has done so before.
    """

    metric = "top1"

    def __init__(self, opened: Opener | None = None) -> None:
        self.opened = opened or Opener()
        self._said = ""

    def resolve(self, settings: Settings) -> Settings:
        return resolve(settings, self.opened)

    def load_data(self, settings: Settings, accelerator: Accelerator) -> Data:
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        return self.opened.data(data_options(settings, **share))

    def found(self, data: Data) -> str:
        """As Task.found; several runs on the same data say it once."""
        said, self._said = self._said, data.found
        return "" if said == data.found else data.found

    def facts(self, data: Data) -> dict[str, Any]:
        facts = {"num_classes": data.num_classes, "class_names": list(data.class_names), "in_chans": data.in_chans}
        return facts | data.counts

    def build(self, settings: Settings, data: Data, folder: Path | None) -> tuple[nn.Module, list[Transplanted]]:
        """As Task.build. Raises ValueError for a run to go on with whose classes had other names."""
        if folder is not None and (before := class_names(runs.read_config(folder)[1])):
            check_unchanged(before, data.class_names, folder)
        saved = runs.holds_weights(folder)
        model = plain_model(settings, data.num_classes, data.in_chans, saved=saved)
        loaded = [] if saved or settings.init is None else load_init(model, settings, data.class_names)
        model = with_teacher(model, settings, data.in_chans, folder)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        return model, loaded

    def keep(self, settings: Settings, folder: Path) -> None:
        """The teacher of a student."""
        if settings.teacher is not None:
            transfer.keep(settings, folder)

    def objective(self, settings: Settings, data: Data) -> Objective:
        recipe = settings.recipe
        return _MixedLoss(create_mixup(recipe, data.num_classes), create_loss(recipe), settings.channels_last)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, data: Data
    ) -> dict[str, float]:
        return evaluate(model, batches, accelerator)

    def epoch_line(self, line: Mapping[str, Any]) -> str:
        ema = f"  EMA {line['ema_top1']:.2f} %" if "ema_top1" in line else ""
        return f"eval {line['eval_loss']:.4f}  top-1 {line['top1']:.2f} %{ema}"

    def result(self, summary: Mapping[str, Any]) -> str:
        best = summary["best"]
        return f"top-1 {summary['top1']:.2f} % (best {best['top1']:.2f} % in epoch {best['epoch']})"

    def summary(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: history[-1][name] if history else None for name in ("top1", "top5")}


def train(settings: Settings, *, data: Data | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run `settings` to the end, or go on with the run they name, and return its summary."""
    return Trainer(Classification(), settings, data, console).fit()
