"""A run opened to be looked at: its settings, its model, fixed samples of its data, its path of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from karat import runs
from karat.data.augment import Fit, Normalise, decode
from karat.data.sources import size_of
from karat.data.splits import Data, open_splits
from karat.runs.classification import Settings
from karat.runs.files import read_json
from karat.runs.model import input_size, load_run
from karat.study.compare import RESULT

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

    @property
    def label(self) -> str:
        """How the run is called in figures: its contender's name, with the seed where that isn't 0."""
        seed = f" seed {self.settings.seed}" if self.settings.seed else ""
        return f"{self.contender}{seed}"

    @property
    def contender(self) -> str:
        """The attention, with the MLP where it isn't the model's own, as in `karat compare`: "g3b", "softmax/grkan"."""
        return self.settings.label

    def model(self, weights: str = "last") -> nn.Module:
        """The run's model in evaluation mode, with its last, best or averaged ("ema") weights."""
        if weights not in WEIGHTS:
            raise ValueError(f"unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}")
        return load_run(self.folder, weights)

    def data(self, split: str = "eval", count: int | None = None) -> Data:
        """The run's data, seen as in evaluation; `split` is what its `eval` holds, `count` images of it at most."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        s = self.settings
        splits = open_splits(s.data, data_dir=Path(s.data_dir) if s.data_dir else None, num_samples=s.num_samples)
        if not splits.class_names:  # a stream that doesn't name them
            splits.class_names = tuple(map(str, range(int(self.facts["num_classes"]))))
        splits = splits if split == "eval" else dataclasses.replace(splits, eval=splits.train)
        total = size_of(splits.eval)
        return Data(
            s.data,
            splits,
            img_size=s.img_size or input_size(s.model),
            recipe=s.recipe,
            batch_size=128,
            workers=0,
            seed=0,
            on_bad_image=s.on_bad_image,
            rank=0,
            world_size=1,
            num_classes=int(self.facts["num_classes"]),
            fraction=1.0 if count is None or count >= total else count / total,
            mean=None,
            std=None,
        )

    def samples(self, count: int, split: str = "eval") -> Samples:
        """`count` images, the same ones each time (all of them where the data has fewer)."""
        if count < 1:
            raise ValueError(f"samples must be >= 1, got {count}")
        data = self.data(split, count)
        batches = list(data.eval)
        images, labels = (torch.cat([batch[i] for batch in batches])[:count] for i in (0, 1))
        return Samples(images, labels, shown(images, data.mean, data.std), data.class_names)

    def image(self, path: Path) -> Samples:
        """One image file as the model takes it, label -1. Raises ValueError for a file that isn't a whole image."""
        data = self.data("eval", 1)
        pixels = self._fit(data.img_size)(read_image(path, data.in_chans))
        images = Normalise(data.mean, data.std)(pixels.unsqueeze(0))
        return Samples(images, torch.tensor([-1]), shown(images, data.mean, data.std), data.class_names)

    def object_mask(self, mask: Image.Image) -> Tensor:
        """An object's mask, white on black in an image's own pixels, as the model sees that image: boolean (S,S)."""
        data = self.data("eval", 1)
        return self._fit(data.img_size, "nearest")(mask.convert("L"))[0] > 127

    def _fit(self, img_size: int, interpolation: str | None = None) -> Fit:
        recipe = self.settings.recipe
        return Fit(img_size, recipe.crop_pct, interpolation or recipe.interpolation)


def read_image(path: Path, in_chans: int) -> Image.Image:
    """An image file in colour (3 channels) or grey (1). Raises ValueError for one that can't be read or is torn."""
    try:
        return decode(str(path), in_chans)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: give the path of an image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image of a known format; give a PNG, JPEG or the like") from None
    except Exception as error:  # a broken file can raise anything from within PIL's codecs
        raise ValueError(
            f"{path} can't be read as an image ({' '.join(str(error).split())}); give a whole one"
        ) from None


def shown(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images (B,C,S,S) back as pixels (B,S,S,3) in [0, 1]; grey ones with three equal channels."""
    shape = (1, -1, 1, 1)
    pixels = images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clamp(0, 1)


def open_run(folder: Path | str) -> Run:
    """Open a run's folder. Raises ValueError where it isn't one."""
    folder = Path(folder)
    settings, facts = runs.read_config(folder)
    return Run(folder, settings, facts, runs.read_history(folder))


def runs_in(folder: Path) -> list[Path]:
    """The runs that a folder stands for: those of a comparison, in its order; else the folder itself."""
    if not (folder / RESULT).is_file():
        return [folder]
    rows = read_json(folder / RESULT)["rows"]
    return [folder / Path(run).name for row in rows for run in row["runs"]]  # by name, so that it may be moved


def labels_of(opened: list[Run]) -> list[str]:
    """One label a run, the folder's name added where two would be called alike."""
    labels = [run.label for run in opened]
    return [
        f"{label} ({run.folder.name})" if labels.count(label) > 1 else label
        for run, label in zip(opened, labels, strict=True)
    ]


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
    for name, index in dict.fromkeys([("start", 0), ("middle", last // 2), ("end", last)]):
        if not (name == "middle" and index in (0, last)) and not (name == "end" and last == 0):
            yield name, *checkpoints[index]
