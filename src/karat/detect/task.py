"""Detection as a task of the training loop (`karat.train.engine`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from karat import runs
from karat.data.labels import check_unchanged
from karat.detect.data import DetectData, load_data
from karat.detect.detector import Detector, build_detector
from karat.detect.evaluate import measure
from karat.detect.init import load_init
from karat.detect.measure import categories_of
from karat.detect.settings import DetectSettings
from karat.train.engine import Trainer
from karat.train.init import Transplanted
from karat.train.task import Batch, Objective, Task

FIGURES = ("box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75")


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of Mask R-CNN's five losses: proposals (found, placed), boxes (class, place), masks."""
    images, targets = batch
    return torch.stack(list(model(images, targets).values())).sum()


class Detection(Task[DetectSettings, DetectData]):
    """Images to boxes and masks; `best` follows the average precision of boxes."""

    metric = "box_AP"

    def resolve(self, settings: DetectSettings) -> DetectSettings:
        return settings.resolved()

    def load_data(self, settings: DetectSettings, accelerator: Accelerator) -> DetectData:
        return load_data(settings, accelerator.process_index, accelerator.num_processes)

    def facts(self, data: DetectData) -> dict[str, Any]:
        return {
            "categories": [{"id": number, "name": name} for number, name in data.categories.items()],
            "train_images": len(data.train_part),
            "eval_images": len(data.eval_part),
            "skipped": data.skipped,
        }

    def found(self, data: DetectData) -> str:
        parts = data.train_part, data.eval_part
        objects = sum(len(picture.things) for part in parts for picture in part.pictures)
        return (
            f"{sum(map(len, parts)):,} images with {objects:,} objects in {data.num_classes} classes; "
            f"trained on {len(parts[0]):,}, evaluated on {len(parts[1]):,}"
        )

    def notes(self, data: DetectData) -> list[str]:
        """What was left out or changed."""
        return data.skipped

    def build(
        self, settings: DetectSettings, data: DetectData, folder: Path | None
    ) -> tuple[nn.Module, list[Transplanted]]:
        """As Task.build. Raises ValueError for a run to go on with whose categories had other names."""
        if folder is not None:
            before = categories_of(runs.read_config(folder, DetectSettings)[1], folder)
            check_unchanged(before.values(), data.categories.values(), folder)
        detector = build_detector(settings, data.num_classes)
        if settings.init is None or runs.holds_weights(folder):
            return detector, []
        return detector, load_init(detector, settings, list(data.categories.values()))

    def objective(self, settings: DetectSettings, data: DetectData) -> Objective:
        return total_loss

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, data: DetectData
    ) -> dict[str, float]:
        assert isinstance(model, Detector)
        figures, _ = measure(model, batches, data.eval_part, accelerator)
        return figures

    def also_measured(
        self, settings: DetectSettings, model: nn.Module, accelerator: Accelerator, data: DetectData
    ) -> dict[str, float]:
        """With `eval_train` the figures of the training images, as train_box_AP and so on."""
        if not settings.eval_train:
            return {}
        assert isinstance(model, Detector)
        figures, _ = measure(model, data.measuring(data.train_part), data.train_part, accelerator)
        return {f"train_{name}": value for name, value in figures.items() if name != "images"}

    def epoch_line(self, line: Mapping[str, Any]) -> str:
        said = f"box AP {line['box_AP']:.2f} (AP50 {line.get('box_AP50', 0.0):.2f})"
        if "mask_AP" in line:
            said += f"  mask AP {line['mask_AP']:.2f}"
        if "ema_box_AP" in line:
            said += f"  EMA {line['ema_box_AP']:.2f}"
        if "train_box_AP" in line:
            said += f"  on training images AP50 {line.get('train_box_AP50', 0.0):.2f}"
        return said

    def result(self, summary: Mapping[str, Any]) -> str:
        best = f"best {summary['best']['box_AP']:.2f} in epoch {summary['best']['epoch']}"
        masks = f", mask AP {summary['mask_AP']:.2f}" if "mask_AP" in summary else ""
        return f"box AP {summary['box_AP']:.2f} ({best}){masks}"

    def summary(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """As Task.summary; figures of masks only where they were measured."""
        last = history[-1] if history else dict.fromkeys(FIGURES)
        return {name: last.get(name) for name in FIGURES if name in last or name.startswith("box")}

    def compile(self, model: nn.Module) -> None:
        """The trunk alone: what follows has shapes of its own for every image."""
        assert isinstance(model, Detector)
        model.trunk.compile()


def train(
    settings: DetectSettings, *, data: DetectData | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run `settings` to the end, or go on with the run they name, and return its summary."""
    return Trainer(Detection(), settings, data, console).fit()
