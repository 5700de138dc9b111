"""What the training loop does not know: which model, which data, what a batch's loss is, how a model is measured.

The loop (`karat.train.engine`) updates, saves, resumes and reports; a Task fills in the rest. Classification is one,
detection another (`karat.detect`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from karat.runs.settings import RunSettings
from karat.train.init import Transplanted

# A batch: images first, then what is known of each of them, as long as there are images. Both may be nested.
Batch = tuple[Any, Any]
Objective = Callable[[nn.Module, Batch], Tensor]


S = TypeVar("S", bound=RunSettings)
D = TypeVar("D")  # the data: `train` and `eval`, which are Loaders


class Task(ABC, Generic[S, D]):
    """One kind of training. `metric` is the evaluation's figure that `best` follows, higher being better."""

    metric: ClassVar[str]

    @abstractmethod
    def resolve(self, settings: S) -> S:
        """The settings with every `auto` replaced by what it stands for, so that config.json repeats the run."""

    @abstractmethod
    def load_data(self, settings: S, accelerator: Accelerator) -> D:
        """The data, this process's share. Raises ValueError for data that can't be used."""

    @abstractmethod
    def facts(self, data: D) -> dict[str, Any]:
        """What of the data config.json must hold so that the model can be built again, plain values."""

    def found(self, data: D) -> str:
        """What is trained on and what was left out, in a line that is said first; nothing, as a rule."""
        return ""

    def notes(self, data: D) -> list[str]:
        """What there is to say of the data before training; nothing, as a rule."""
        return []

    @abstractmethod
    def build(self, settings: S, data: D, folder: Path | None) -> tuple[nn.Module, list[Transplanted]]:
        """The model on the CPU, from torch's present random state, and what --init gave it.

        folder: of the run that is resumed; None for a new one.
        """

    def keep(self, settings: S, folder: Path) -> None:
        """Copy into the run what else it needs to be opened; nothing, as a rule."""

    @abstractmethod
    def objective(self, settings: S, data: D) -> Objective:
        """The function from the model and a batch, which lies on the device, to the mean loss to minimise."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, data: D
    ) -> dict[str, float]:
        """The model's figures on this process's share of the evaluation images; the same on every process.

        The model is left in the mode it came in. Among the figures are `metric` and "images", their number.
        """

    def also_measured(self, settings: S, model: nn.Module, accelerator: Accelerator, data: D) -> dict[str, float]:
        """Further figures of the weights in training, for the same line; none, as a rule."""
        return {}

    @abstractmethod
    def epoch_line(self, line: Mapping[str, Any]) -> str:
        """An epoch's figures for the terminal."""

    @abstractmethod
    def result(self, summary: Mapping[str, Any]) -> str:
        """A finished run's figures for the terminal."""

    def summary(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures of the last epoch that summary.json holds, None before the first."""
        return {self.metric: history[-1][self.metric] if history else None}

    def compile(self, model: nn.Module) -> None:
        """Compile what of the model can be, in place."""
        model.compile()
