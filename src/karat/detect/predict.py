"""What a run's detector finds in image files: drawn, beside the truth where it is known, and as COCO's detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from karat import runs
from karat.data.images import read_file
from karat.detect.coco import Picture
from karat.detect.data import open_parts
from karat.detect.draw import beside, draw, found_objects, true_objects
from karat.detect.evaluate import as_results
from karat.detect.measure import load_run
from karat.detect.settings import DetectSettings
from karat.detect.views import View
from karat.runs.files import write_json
from karat.runs.settings import Device
from karat.train.build import create_accelerator
from karat.train.processes import refuse_several


@torch.no_grad()
def predict_images(
    run: Path,
    images: Sequence[Path],
    *,
    weights: str = "last",
    score: float = 0.5,
    output: Path | None = None,
    device: Device | None = None,
) -> list[tuple[Path, int]]:
    """Draw each image's detections of at least `score` into `output` (RUN/predictions); (drawing, how many) of each.

    An image of the run's own data is drawn twice, the truth on the right. All detections, whatever their score, are in
    predictions.json beside the drawings: COCO's results format with the file's name as `file_name`.

    Raises ValueError for an image that is missing or can't be decoded, a score outside [0, 1], and as `load_run` does.
    """
    refuse_several("karat detect predict runs in one process: leave the launcher out")
    if not images:
        raise ValueError("no images: name at least one image file")
    if not 0 <= score <= 1:
        raise ValueError(f"score={score}: give a value in [0, 1]")
    detector, settings, categories = load_run(run, weights)
    if device is not None:
        settings = replace(settings, device=device)
    accelerator = create_accelerator(settings, training=False)
    detector.to(accelerator.device)
    target = output or run / runs.PREDICTIONS
    target.mkdir(parents=True, exist_ok=True)
    known = _known(settings, categories)
    view, names = View(settings.recipe, train=False), list(categories.values())
    drawn: list[tuple[Path, int]] = []
    results: list[dict[str, Any]] = []
    for number, path in enumerate(images):
        image = read_file(path)
        size = (image.height, image.width)
        pixels, _ = view(image, Picture(path, number, size, ()))
        with accelerator.autocast():
            (found,) = detector([pixels.to(accelerator.device)], sizes=[size])
        results += [{"file_name": path.name, **r} for r in as_results(found, number, list(categories))]
        objects = found_objects(found, names, score)
        sheets, titles = [draw(image, objects)], [f"found, score at least {score:g}"]
        truth = known.get(path.resolve())
        if truth is not None:
            sheets.append(draw(image, true_objects(truth, names)))
            titles.append("annotated")
        place = _free(target, path.stem, {p for p, _ in drawn})
        beside(sheets, titles).save(place, quality=85)
        drawn.append((place, len(objects)))
    write_json(target / "predictions.json", results)
    return drawn


def _known(settings: DetectSettings, categories: dict[int, str]) -> dict[Path, Picture]:
    """The pictures of the run's own data by their files; none where the data isn't there any more."""
    try:
        parts = [part.under(categories) for part in open_parts(settings)]
    except ValueError:
        return {}
    return {picture.path.resolve(): picture for part in parts for picture in part.pictures}


def _free(folder: Path, stem: str, taken: set[Path]) -> Path:
    """STEM.jpg, with a number where another image of this call has that name."""
    names = [folder / f"{stem}.jpg", *(folder / f"{stem}-{n}.jpg" for n in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)
