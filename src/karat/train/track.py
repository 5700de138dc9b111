"""Where a run reports to: a progress bar with images/s and time left, and trackers (TensorBoard by default)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from karat import runs


class Tracker(Protocol):
    """Takes the numbers of an epoch."""

    def log(self, values: Mapping[str, float], epoch: int) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in RUN/tensorboard; events after the epochs that are `done` are replaced when a run resumes."""

    def __init__(self, run: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / runs.TENSORBOARD), purge_step=done + 1 if done else None)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class HostedTracker:
    """wandb or trackio, which share one interface."""

    def __init__(self, library: str, run: Path, config: Mapping[str, Any]) -> None:
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"--track {library}: {library} is not installed (pip install {library})")
        self.library = importlib.import_module(library)
        self.library.init(project="karat", name=run.name, config=dict(config))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.library.log({**values, "epoch": epoch})

    def close(self) -> None:
        self.library.finish()


def trackers(names: tuple[str, ...], run: Path, config: Mapping[str, Any], done: int) -> list[Tracker]:
    """The trackers of these names, which the settings have checked; ValueError for one that is not installed."""
    return [
        TensorBoardTracker(run, done) if name == "tensorboard" else HostedTracker(name, run, config) for name in names
    ]


class Bar:
    """The progress of one run: a bar on a terminal, and one line an epoch everywhere."""

    def __init__(self, console: Console, label: str, *, total: int, done: int, epochs: int) -> None:
        self.console, self.label, self.epochs = console, label, epochs
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps  loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(label, total=total, completed=done, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def advance(self, epoch: int, loss: float, speed: float) -> None:
        """After one update."""
        label = f"{self.label}  epoch {epoch + 1}/{self.epochs}"
        self.progress.update(self.task, advance=1, description=label, loss=loss, speed=speed)

    def epoch(self, line: Mapping[str, Any], measured: str, seconds_left: float) -> None:
        """After one epoch: a line that stays, with what the evaluation measured in words."""
        minutes, seconds = divmod(round(seconds_left), 60)
        self.console.print(
            f"{self.label}  epoch {line['epoch']}/{self.epochs}  loss {line['train_loss']:.4f}  "
            f"{measured}  {line['images_per_second']:.0f} images/s  {minutes}:{seconds:02d} left",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
