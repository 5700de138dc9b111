"""Figure 1a: parameters against accuracy, measured runs and published models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karat import runs
from karat.runs import files
from karat.study.compare import RESULT


@dataclass(frozen=True)
class Point:
    """One model: what it is called, its kind (points of a kind are drawn alike), millions of parameters, top-1 in %."""

    label: str
    kind: str
    params_M: float
    top1: float
    dataset: str
    source: str


_PAPER = "arXiv 2503.10632, Table 1"
_KAT = "arXiv 2409.10594, Table 5"

# ImageNet-1K. Tiny and Base of the first source are counted with 10 classes, as it counts them. Vision-KAN gives no
# size; 12.8 M is what the second source has for ViT-T + KAN, and what its hidden width of 192 comes to here.
PUBLISHED: tuple[Point, ...] = tuple(
    Point(label, kind, params, top1, "imagenet1k", source)
    for kind, source, entries in (
        ("softmax", _PAPER, (("ViT-T", 5.53, 59.15), ("ViT-S", 22.05, 70.50), ("ViT-B", 85.81, 72.90))),
        (
            "KArAt",
            _PAPER,
            (
                ("ViT-T+G3B", 6.29, 59.11),
                ("ViT-T+G3U", 5.59, 57.97),
                ("ViT-S+G3B", 23.58, 67.77),
                ("ViT-S+G3U", 22.18, 67.76),
                ("ViT-B+G1B", 87.51, 68.03),
                ("ViT-B+G1U", 85.95, 68.83),
            ),
        ),
        ("KAT", _KAT, (("KAT-T", 5.7, 74.6), ("KAT-S", 22.1, 81.2), ("KAT-B", 86.6, 82.3))),
        ("ViT+KAN", _KAT, (("ViT-S+KAN", 50.4, 62.9),)),
        ("ViT+KAN", "github.com/chenziwenhaoshuai/Vision-KAN", (("Vision-KAN", 12.8, 64.87),)),
    )
    for label, params, top1 in entries
)


def measured_points(folders: Sequence[Path | str]) -> list[Point]:
    """One point for each row of a comparison's folder, or for a run's folder; top-1 of the last epoch.

    Raises ValueError for no folder, one that holds neither, or a run that hasn't finished.
    """
    if not folders:
        raise ValueError("name at least one folder, of a comparison or a run")
    points = []
    for folder in map(Path, folders):
        if (folder / RESULT).is_file():
            found = files.read_json(folder / RESULT)
            data = _name(found["settings"]["data"])
            points += [
                Point(row["attention"], "measured", row["parameters"] / 1e6, row["top1"], data, str(folder))
                for row in found["rows"]
            ]
            continue
        settings, _ = runs.read_config(folder)
        if not (folder / runs.SUMMARY).is_file():
            raise ValueError(f"{folder} hasn't finished (it has no {runs.SUMMARY}); go on with it: --resume {folder}")
        summary = files.read_json(folder / runs.SUMMARY)
        label = settings.label if settings.label == settings.model else f"{settings.model} {settings.label}"
        points.append(
            Point(label, "measured", summary["parameters"] / 1e6, summary["top1"], _name(settings.data), str(folder))
        )
    return points


def _name(data: str) -> str:
    """A data set's name: "cifar10" of "torch/cifar10" and of a folder's path alike."""
    return Path(data).name
