"""Detection as a task of the training loop (`karat.train.engine`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from karat.detect.data import DetectData, load_data
from karat.detect.detector import Detector, build_detector
from karat.detect.evaluate import measure
from karat.detect.init import load_init
from karat.detect.settings import DetectSettings
from karat.train import randomness
from karat.train.engine import Trainer
from karat.train.init import Transplanted
from karat.train.task import Batch, Objective, Task

FIGURES = ("box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75")


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of Mask R-CNN's five losses: proposals (found, placed), boxes (class, place), masks."""
    images, targets = batch
    return torch.stack(list(model(images, targets).values())).sum()


class Detection(Task):
    """Images to boxes and masks; `best` follows the average precision of boxes."""

    metric = "box_AP"

    def __init__(self, settings: DetectSettings) -> None:
        self.settings = settings

    def load_data(self, accelerator: Accelerator) -> DetectData:
        """As Task.load_data."""
        return load_data(self.settings, accelerator.process_index, accelerator.num_processes)

    def facts(self, data: DetectData) -> dict[str, Any]:
        """As Task.facts."""
        return {
            "categories": [{"id": number, "name": name} for number, name in data.categories.items()],
            "train_images": len(data.train_part),
            "eval_images": len(data.eval_part),
            "skipped": data.skipped,
        }

    def build(self, data: DetectData, folder: Path | None) -> tuple[nn.Module, list[Transplanted]]:
        """As Task.build."""
        detector = build_detector(self.settings, data.num_classes)
        return detector, [] if self.settings.init is None else load_init(detector, self.settings)

    def objective(self, data: DetectData) -> Objective:
        """As Task.objective."""
        return total_loss

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, data: DetectData
    ) -> dict[str, float]:
        """As Task.evaluate."""
        assert isinstance(model, Detector)
        figures, _ = measure(model, batches, data.eval_part, accelerator)
        return figures

    def evaluate_train(self, model: nn.Module, accelerator: Accelerator, data: DetectData) -> dict[str, float]:
        """The same of the training images, as train_box_AP and so on."""
        assert isinstance(model, Detector)
        figures, _ = measure(model, data.measuring(data.train_part), data.train_part, accelerator)
        return {f"train_{name}": value for name, value in figures.items() if name != "images"}

    def epoch_line(self, line: Mapping[str, Any]) -> str:
        """As Task.epoch_line."""
        said = f"box AP {line['box_AP']:.2f} (AP50 {line.get('box_AP50', 0.0):.2f})  mask AP {line['mask_AP']:.2f}"
        if "ema_box_AP" in line:
            said += f"  EMA {line['ema_box_AP']:.2f}"
        if "train_box_AP" in line:
            said += f"  on training images AP50 {line.get('train_box_AP50', 0.0):.2f}"
        return said

    def summary(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """As Task.summary."""
        return {name: history[-1].get(name) if history else None for name in FIGURES}

    def compile(self, model: nn.Module) -> None:
        """The trunk alone: what follows has shapes of its own for every image."""
        assert isinstance(model, Detector)
        model.trunk.compile()


class DetectTrainer(Trainer):
    """The training loop, on detection."""

    settings: DetectSettings
    task: Detection

    def create_task(self, settings: DetectSettings) -> Detection:
        """As Trainer.create_task."""
        return Detection(settings)

    def fit(self) -> dict[str, Any]:
        """As Trainer.fit; says first what of the data was left out."""
        self.notes += self.data.skipped
        return super().fit()

    def _evaluate(self) -> dict[str, float]:
        """As Trainer's; with `eval_train` the training images' figures too, of the weights in training alone."""
        line = super()._evaluate()
        if self.settings.eval_train:
            with randomness.aside(self.settings.seed):
                line |= self.task.evaluate_train(self.parts.bare, self.accelerator, self.data)
        return line


def train(
    settings: DetectSettings, *, data: DetectData | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run `settings` to the end, or go on with the run they name, and return its summary."""
    return DetectTrainer(settings, data=data, console=console).fit()
