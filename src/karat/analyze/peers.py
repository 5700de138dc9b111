"""Figure 1a: parameters against accuracy, measured runs and published models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karat import runs
from karat.paper.published import values_by_model
from karat.runs import files


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

# Of other papers, on ImageNet-1K. Vision-KAN gives no size; 12.8 M is what the first source has for ViT-T + KAN, and
# what its hidden width of 192 comes to here.
_OTHERS = (
    Point("KAT-T", "KAT", 5.7, 74.6, "imagenet1k", _KAT),
    Point("KAT-S", "KAT", 22.1, 81.2, "imagenet1k", _KAT),
    Point("KAT-B", "KAT", 86.6, 82.3, "imagenet1k", _KAT),
    Point("ViT-S+KAN", "ViT+KAN", 50.4, 62.9, "imagenet1k", _KAT),
    Point("Vision-KAN", "ViT+KAN", 12.8, 64.87, "imagenet1k", "github.com/chenziwenhaoshuai/Vision-KAN"),
)


def published_points() -> list[Point]:
    """Published models on ImageNet-1K: those of the paper's Table 1 (Tiny and Base counted with 10 classes), others."""
    top1, sizes = values_by_model(1, "imagenet1k"), values_by_model(1)
    found = []
    for (model, variant), values in top1.items():
        plain = variant == "softmax"
        label = f"ViT-{model.removeprefix('vit_')[0].upper()}" + ("" if plain else f"+{variant.upper()}")
        size = sizes[model, variant]["params_M"]
        found.append(Point(label, "softmax" if plain else "KArAt", size, values["top1"], "imagenet1k", _PAPER))
    return [*found, *_OTHERS]


def measured_points(folders: Sequence[Path | str]) -> list[Point]:
    """One point for each row of a comparison's folder, or for a run's folder; top-1 of the last epoch.

    Raises ValueError for no folder, one that holds neither, or a run that hasn't finished.
    """
    if not folders:
        raise ValueError("name at least one folder, of a comparison or a run")
    points = []
    for folder in map(Path, folders):
        if (folder / runs.COMPARISON).is_file():
            found = files.read_json(folder / runs.COMPARISON)
            for row in found["rows"]:
                if "settings" in found:
                    data = found["settings"]["data"]
                else:  # a study's, whose variants have their own
                    data = runs.read_config(folder / Path(row["runs"][0]).name)[0].data
                size = row["parameters"] / 1e6
                points.append(Point(row["attention"], "measured", size, row["top1"], _name(data), str(folder)))
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
