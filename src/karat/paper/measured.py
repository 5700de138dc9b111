"""What was measured beside what was published: runs matched to rows by model, attention and data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karat import runs
from karat.detect.recipes import RECIPES
from karat.detect.settings import DetectSettings
from karat.operator.config import KArAtConfig
from karat.paper.entries import Entry
from karat.paper.setup import DATASETS, MODELS, PROGRAMS
from karat.runs.classification import Settings
from karat.runs.settings import RunSettings

FIGURES = ("top1", "top5", "box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75")
HEADS = ("pre_nms", "post_nms", "rpn_anchors", "rois", "channels", "head_width", "mask_convs")
ALIASES = {"imagenet": "imagenet1k", "ilsvrc2012": "imagenet1k", "fashionmnist": "fashion_mnist"}


@dataclass(frozen=True)
class Measured:
    """A run's result: its figures after its last epoch (top1, box_AP, ...), in percent."""

    run: str
    dataset: str
    settings: RunSettings
    figures: dict[str, float]
    epochs: int
    published_epochs: int | None = None  # of the row that it is set beside; none: those of its own recipe
    teacher: Settings | None = None  # the teacher's, of a run on transferred attention

    @property
    def caveat(self) -> str:
        """In what the extent of the run differs from the published one's; empty if in nothing."""
        s, parts = self.settings, []
        planned = self.published_epochs or s.recipe.epochs
        if self.epochs < planned:
            parts.append(f"{self.epochs} of {planned} epochs done")
        if s.data_fraction < 1:
            parts.append(f"{s.data_fraction:.2g} of the data")
        if isinstance(s, Settings) and s.held_out:
            parts.append(f"measured on {s.held_out:,} training images held out")
        if s.sizes:
            parts.append("another size of model")
        if isinstance(s, DetectSettings):
            published = RECIPES["published"]
            if s.recipe.img_size != published.img_size:
                parts.append(f"images of {s.recipe.img_size} pixels, not {published.img_size}")
            if any(getattr(s.recipe, name) != getattr(published, name) for name in HEADS):
                parts.append("proposals and heads of another size")
        return ", ".join(parts)


def read_run(folder: str | Path) -> Measured:
    """A finished or unfinished run's result. Raises ValueError when it is no run or has no finished epoch."""
    path = Path(folder)
    kind = DetectSettings if runs.task_of(path) == DetectSettings.task else Settings
    settings: RunSettings
    settings, facts = runs.read_config(path, kind)
    if "converted_from" in facts:
        raise ValueError(f"{path} was converted, not trained: the published figures are those of trained models")
    history: list[dict[str, Any]] = runs.read_history(path)
    if not history:
        raise ValueError(f"{path} has no finished epoch to compare")
    last = history[-1]
    teacher = None
    if isinstance(settings, Settings) and settings.teacher is not None:
        teacher, _ = runs.read_config(path / runs.TEACHER)
    figures = {name: float(value) for name, value in last.items() if name in FIGURES}
    return Measured(str(folder), dataset_of(settings.data), settings, figures, len(history), teacher=teacher)


def dataset_of(data: str) -> str:
    """The published name of the data set that a `--data` means, by its last part; "" for one that isn't published.

    >>> dataset_of("../shared/data/cifar10"), dataset_of("hfds/uoft-cs/cifar100"), dataset_of("digits")
    ('cifar10', 'cifar100', '')
    """
    last = data.rstrip("/").split("/")[-1].lower().replace("-", "")
    name = ALIASES.get(last, last)
    return name if name in DATASETS else ""


def matching(entry: Entry, measured: Sequence[Measured]) -> list[Measured]:
    """The runs of the entry's model, attention and data set, trained the way of its kind (from scratch or not).

    Edge scales, initialisation and implementation may differ: they are ways to the same operator.
    """
    if entry.setup.kind not in PROGRAMS or entry.metric not in FIGURES:
        return []
    wanted, tuned = plain(entry.setup.config), entry.setup.init != "random"
    return [
        m
        for m in measured
        if m.dataset == entry.dataset
        and entry.metric in m.figures
        and m.settings.model in (entry.setup.model, f"karat_{MODELS[entry.model]}")
        and plain(KArAtConfig.parse(m.settings.attention)) == wanted
        and getattr(m.settings, "mlp", "mlp") == "mlp"  # a detector always has its model's own
        and (m.settings.init is not None) == tuned
        and _same_teacher(entry, m.teacher)
    ]


def _same_teacher(entry: Entry, teacher: Settings | None) -> bool:
    """Whether a run learnt from such a teacher as the entry's, or both from none."""
    setup = entry.setup
    if teacher is None or not setup.teacher:
        return teacher is None and not setup.teacher
    alike = plain(KArAtConfig.parse(teacher.attention)) == plain(KArAtConfig.parse(setup.teacher_attention))
    return alike and teacher.model.removeprefix("karat_") == setup.teacher_model


def plain(config: KArAtConfig) -> KArAtConfig:
    """The configuration without what does not change which function can be learned."""
    return replace(config, edge_scales=False, init="default", impl="auto")


def compare(entries: Sequence[Entry], folders: Sequence[str | Path]) -> list[tuple[Entry, Measured]]:
    """Every (published figure, run) that belong together. Raises ValueError for a folder that is no run."""
    measured = [read_run(folder) for folder in folders]
    return [
        (entry, replace(run, published_epochs=entry.setup.epochs))
        for entry in entries
        for run in matching(entry, measured)
    ]
