"""Runs opened to be looked at, each part once, and the options of looking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from torch import nn

from karat.analyze.attention import BlockAttention, attention_of, check_head, choose_block
from karat.analyze.functions import operators_of
from karat.analyze.landscape import Progress
from karat.analyze.loading import Run, Samples, labels_of, open_run, runs_in
from karat.data.images import read_file
from karat.operator.config import KArAtConfig
from karat.runs.settings import slug, told
from karat.values import Count, Natural, Positive, Range, Seed


@dataclass(frozen=True)
class Options:
    """How runs are looked at; every analysis takes what concerns it."""

    weights: Literal["last", "best", "ema"] = "last"
    """Weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    block: Natural | None = None
    """The block to look at, counted from 0; none: the last one."""
    head: Natural | None = None
    """The head to look at, counted from 0; none: all, or the dominant one."""
    images: Count = 8
    """How many evaluation images attention and spectra are computed on; the same ones each time."""
    image: Path | None = None
    """An image file to look at instead of the run's data (attention, spectrum, functions)."""
    mask: Path | None = None
    """With --image: the object's mask in that image's pixels, white on black; maps are measured against it."""
    box: tuple[float, float, float, float] | None = None
    """With --image: the object's box x0 y0 x1 y1 in that image's pixels, instead of a mask."""
    signed: bool = False
    """Keep negative values in maps; off: clipped, as in the paper's figures."""
    directions: Literal["path", "random"] = "path"
    """Plane of the landscape: along the path of training, or two filter-normalised random directions."""
    points: Annotated[int, Range("give 3 to 1001", 3, 1001)] = 21
    """Points a side of the landscape."""
    reach: Positive = 1.0
    """With random directions: how far the landscape reaches, in lengths of the filters."""
    samples: Count = 128
    """Images that a landscape, an ablation and averaging are computed on."""
    split: Literal["train", "eval"] = "train"
    """Which part of the data they come from; without augmentation in either case."""
    eigenvalues: Count = 3
    """How many top eigenvalues of the Hessian."""
    probes: Count = 10
    """Random vectors for the trace of the Hessian."""
    hessian_samples: Count = 32
    """Images that the Hessian is computed on; one graph holds them all."""
    seed: Seed = 0
    """Seed of random directions and probes."""
    sweep: str | None = None
    """The setting to draw a sweep along, e.g. grid, rank, order or basis; none: the one with the most values."""


@dataclass
class Subject:
    """A run that is looked at: its model, samples and recorded attention, each made when first asked for."""

    run: Run
    label: str
    options: Options
    progress: Progress | None = None

    @property
    def key(self) -> str:
        """The label as part of a file's name."""
        return slug(self.label)

    @property
    def learns(self) -> bool:
        """Whether the run's attention is an operator's."""
        return KArAtConfig.parse(self.run.settings.attention).has_operator

    @cached_property
    def model(self) -> nn.Module:
        """The model with the weights that the options name."""
        return self.run.model(self.options.weights)

    @cached_property
    def samples(self) -> Samples:
        """The images to look at: the run's data, or the one image that the options name."""
        image = self.options.image
        return self.run.samples(self.options.images) if image is None else self.run.image(image)

    @cached_property
    def loss_samples(self) -> Samples:
        """The images that losses are computed on."""
        return self.run.samples(self.options.samples, self.options.split)

    @cached_property
    def attention(self) -> list[BlockAttention]:
        """Scores and σ of every block on `samples`."""
        return attention_of(self.model, self.samples.images)


def open_subjects(folders: Sequence[Path], options: Options, progress: Progress | None = None) -> list[Subject]:
    """Runs opened by their folders, labelled so that no two are called alike; a comparison's folder means its runs.

    Raises ValueError for no folder, one that is no run's, or a run that is named twice.
    """
    chosen = [run for folder in folders for run in runs_in(folder)]
    if not chosen:
        raise ValueError("name at least one run's folder")
    places = [run.resolve() for run in chosen]
    twice = next((run for run, place in zip(chosen, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: name each run once")
    _check_object(options)
    opened = [open_run(folder) for folder in chosen]
    found = [Subject(run, label, options, progress) for run, label in zip(opened, labels_of(opened), strict=True)]
    if options.block is not None or options.head is not None:
        for s in found:
            check_head(options.head or 0, choose_block(s.attention, options.block).sigma.shape[1])
    return found


def shown_settings(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """The settings that say how runs were trained, in words: one text a run."""
    plain = [told(s.run.settings) for s in subjects]
    names = dict.fromkeys(name for one in plain for name in one)
    return {name: ["–" if one.get(name) is None else str(one[name]) for one in plain] for name in names}


def _check_object(options: Options) -> None:
    """ValueError for an image that isn't there, and for a mask or a box that isn't one object of it."""
    image, box = options.image, options.box
    if options.mask is not None and box is not None:
        raise ValueError("--mask and --box both say where the object is: give one of them")
    if image is None:
        if options.mask is not None or box is not None:
            raise ValueError("--mask and --box belong to one image: name it with --image")
        return
    width, height = read_file(image).size
    if box is not None and not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(
            f"--box {box}: give x0 y0 x1 y1, x0 < x1 and y0 < y1, within {image}'s {width}×{height} pixels"
        )


def learning(subjects: Sequence[Subject]) -> list[Subject]:
    """Those of the runs whose attention learns. Raises ValueError where none does."""
    found = [s for s in subjects if s.learns]
    if not found:
        operators_of(subjects[0].model)  # says what is missing
    return found
