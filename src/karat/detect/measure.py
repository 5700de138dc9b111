"""A run's detector again, and its average precision: what `karat detect eval` prints and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from karat import runs
from karat.detect.coco import CocoPart
from karat.detect.data import DetectData, check_objects, find_files, load_data, open_file
from karat.detect.detector import Detector, build_detector
from karat.detect.evaluate import measure
from karat.detect.settings import DetectSettings
from karat.errors import brief
from karat.runs.checkpoint import load_weights
from karat.runs.settings import Device
from karat.train.build import create_accelerator


def load_run(folder: Path, weights: str = "last") -> tuple[Detector, DetectSettings, dict[int, str]]:
    """A run's detector in evaluation mode on the CPU, its settings, and its categories {id: name}.

    weights: "last", "best" (box AP) or "ema". Raises ValueError when the folder is no run of detection, or its weights
    are missing or were tampered with.
    """
    settings, facts = runs.read_config(folder, DetectSettings)
    categories = categories_of(facts, folder)
    detector = build_detector(settings, len(categories))
    load_weights(detector, runs.read_weights(folder, weights), str(runs.weights_path(folder, weights)))
    return detector.eval(), settings, categories


def categories_of(facts: Mapping[str, Any], folder: Path) -> dict[int, str]:
    """A run's categories {id: name}, by its config.json; ValueError where that holds something else."""
    entries: Any = facts.get("categories")
    try:
        found, count = {entry["id"]: entry["name"] for entry in entries}, len(entries)
    except (TypeError, KeyError, IndexError):
        found, count = {}, 0
    whole = all(type(number) is int and isinstance(name, str) for number, name in found.items())
    if not found or not whole or len(found) < count:
        raise ValueError(
            f"{folder / runs.CONFIG} has the categories {brief(entries)}; a list of id and name belongs there"
        )
    return found


def evaluate_run(
    run: Path,
    *,
    weights: str = "last",
    part: str = "eval",
    data: str | None = None,
    images: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Average precisions of a run on its evaluation images ("eval"), its training images ("train"), or other data.

    Of other `data`, a folder with a training and an evaluation JSON, `part` says which; where there is one, all of it.
    `images` is the folder of the images of what is measured; None: the run's own, of other data beside its JSON.

    Also saved as eval.json, the detections as detections.json (COCO's results format); `said` is where, or why not.
    Categories are matched by name. Raises ValueError for data with objects of others than the run's, a batch_size
    below 1, and as `load_run` does.
    """
    detector, settings, categories = load_run(run, weights)
    changes: dict[str, Any] = {"workers": workers, "device": device, "images": images}
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    accelerator = create_accelerator(settings, training=False)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if data is None:
        loaded = load_data(settings, rank, world_size)
        chosen = (loaded.train_part if part == "train" else loaded.eval_part).under(categories)
    else:
        chosen = _other(data, images, part, settings).under(categories)
        check_objects(chosen, "there are no objects, without which average precision says nothing")
        loaded = DetectData(chosen, chosen, settings, rank, world_size)
    figures, results = measure(
        detector.to(accelerator.device), loaded.measuring(chosen, batch_size), chosen, accelerator
    )
    name = data if data is not None else part
    result = {"run": str(run), "weights": weights, "data": name, "img_size": settings.recipe.img_size, **figures}
    found = {runs.EVAL: result, runs.DETECTIONS: results}
    return result | {"said": runs.keep_measured(run, found) if accelerator.is_main_process else ""}


def _other(data: str, images: str | None, part: str, settings: DetectSettings) -> CocoPart:
    train, evaluation = find_files(replace(settings, data=data, eval_data=None))
    return open_file(train if part == "train" or evaluation is None else evaluation, images)
