"""A run opened to be looked at: its settings, its model, fixed samples of its data, its path of checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from karat import runs
from karat.data.images import Fit, Normalise, read_file, statistics
from karat.data.sources import set_aside, size_of
from karat.data.splits import Data, Opener
from karat.runs.classification import Settings
from karat.runs.files import read_json
from karat.runs.model import class_names, data_options, input_size, load_run
from karat.runs.settings import slug

WEIGHTS = ("last", "best", "ema")
SPLITS = ("eval", "train")


@dataclass(frozen=True)
class Samples:
    """A fixed random subset of a run's data, without augmentation.

    images (B,C,S,S) as the model takes them, labels (B,), pixels (B,S,S,3) in [0, 1] to be shown.
    """

    images: Tensor
    labels: Tensor
    pixels: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run's folder, opened."""

    folder: Path
    settings: Settings
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    opened: Opener = field(default_factory=Opener, repr=False, compare=False)

    @property
    def label(self) -> str:
        """How the run is called in figures: as in `karat compare`, with the seed where that isn't 0."""
        return self.settings.label + (f" seed {self.settings.seed}" if self.settings.seed else "")

    def model(self, weights: str = "last") -> nn.Module:
        """The run's model in evaluation mode, with its last, best or averaged ("ema") weights."""
        if weights not in WEIGHTS:
            raise ValueError(f"unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}")
        return load_run(self.folder, weights)

    def data(self, split: str = "eval", count: int | None = None) -> Data:
        """The run's data, seen as in evaluation; `split` is what its `eval` holds, `count` images of it at most.

        "train": images that the run was trained on; "eval": those that it wasn't, held out where it held some out.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        s = self.settings
        splits = self.opened.splits(s.data, s.data_dir, s.num_samples)
        train, part = set_aside(splits.train, s.held_out) if s.held_out else (splits.train, splits.eval)
        part = part if split == "eval" else train
        total = size_of(part)
        most = total if split == "eval" else max(1, round(s.data_fraction * total))  # `fixed_part` begins with those
        options = data_options(s, batch_size=128, workers=0, seed=0, num_classes=int(self.facts["num_classes"]))
        fraction = min(count or most, most) / total
        options = replace(options, fraction=fraction, held_out=0, classes=class_names(self.facts))
        return Data(options, replace(splits, eval=part))

    def samples(self, count: int, split: str = "eval") -> Samples:
        """`count` images, the same ones each time (all of them where the data has fewer)."""
        if count < 1:
            raise ValueError(f"samples must be >= 1, got {count}")
        data = self.data(split, count)
        batches = list(data.eval)
        images, labels = (torch.cat([batch[i] for batch in batches])[:count] for i in (0, 1))
        return Samples(images, labels, shown(images), data.class_names)

    def image(self, path: Path) -> Samples:
        """One image file as the model takes it, label -1. Raises ValueError for a file that isn't a whole image."""
        in_chans, classes = int(self.facts["in_chans"]), int(self.facts["num_classes"])
        pixels = self._fit()(read_file(path, in_chans))
        images = Normalise(*statistics(in_chans))(pixels.unsqueeze(0))
        names = self.facts.get("class_names") or range(classes)
        return Samples(images, torch.tensor([-1]), shown(images), tuple(map(str, names)))

    def object_mask(self, mask: Image.Image) -> Tensor:
        """An object's mask, white on black in an image's own pixels, as the model sees that image: boolean (S,S)."""
        return self._fit("nearest")(mask.convert("L"))[0] > 127

    def _fit(self, interpolation: str | None = None) -> Fit:
        s = self.settings
        side = s.img_size or input_size(s.model)
        return Fit(side, s.recipe.crop_pct, interpolation or s.recipe.interpolation)


def shown(images: Tensor) -> Tensor:
    """Normalised images (B,C,S,S) back as pixels (B,S,S,3) in [0, 1]; grey ones with three equal channels."""
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in statistics(images.shape[1]))
    pixels = images * std + mean
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clamp(0, 1)


def open_run(folder: Path | str) -> Run:
    """Open a run's folder. Raises ValueError where it isn't one."""
    folder = Path(folder)
    settings, facts = runs.read_config(folder)
    return Run(folder, settings, facts, runs.read_history(folder))


def runs_in(folder: Path) -> list[Path]:
    """The runs that a folder stands for: those of a comparison, in its order; else the folder itself."""
    if not (folder / runs.COMPARISON).is_file():
        return [folder]
    rows = read_json(folder / runs.COMPARISON)["rows"]
    return [folder / Path(run).name for row in rows for run in row["runs"]]  # by name, so that it may be moved


def labels_of(opened: list[Run]) -> list[str]:
    """One label a run; as much of the folder's path is added as tells apart two that would be called alike."""
    paths = [run.folder.resolve().parts for run in opened]
    alike = Counter(slug(run.label) for run in opened)
    for depth in range(1, max(map(len, paths)) + 1):
        labels = [
            f"{run.label} ({'/'.join(path[-depth:])})" if alike[slug(run.label)] > 1 else run.label
            for run, path in zip(opened, paths, strict=True)
        ]
        if len(set(map(slug, labels))) == len(labels):
            return labels
    return [f"{label} {number}" for number, label in enumerate(labels, start=1)]  # "run 1" beside "run-1"


def trajectory(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, weights file) of every light checkpoint of a run, from before the first epoch on.

    Raises ValueError asking for them where there are none.
    """
    paths = sorted((folder / runs.TRAJECTORY).glob("epoch-*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} has no trajectory checkpoints ({folder / runs.TRAJECTORY}/epoch-*.safetensors): "
            "train it with --checkpoints trajectory"
        )
    return [(int(path.stem.removeprefix("epoch-")), path) for path in paths]


def moments(checkpoints: list[tuple[int, Path]]) -> Iterator[tuple[str, int, Path]]:
    """The start, the middle and the end of a trajectory (fewer where it is shorter)."""
    last = len(checkpoints) - 1
    for index, name in sorted({last: "end", last // 2: "middle", 0: "start"}.items()):
        yield name, *checkpoints[index]
