"""The accuracy of a finished or unfinished run's weights: what `karat eval` prints and saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from karat import runs
from karat.data.splits import load_data, same_data
from karat.models.resample import resample_tokens
from karat.models.transfer import teacher_of
from karat.runs.classification import OTHER_DATA
from karat.runs.model import class_names, data_options, input_size, load_run
from karat.runs.settings import Device
from karat.train.build import create_accelerator
from karat.train.evaluate import evaluate


def evaluate_run(
    run: Path,
    *,
    weights: str = "last",
    data: str | None = None,
    img_size: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Top-1, top-5 and loss of a run on its evaluation images, or on another data set's; also saved as eval.json.

    `said` among them is where they were saved, or why they could not be.

    Of another folder its evaluation part is measured, or all of it where it has none.
    Another `img_size` resamples position embeddings and operators to the new token grid (SPEC §9).
    Labels follow the names of the run's classes.

    Raises ValueError for data with a class that the run lacks, and as `load_run` does.
    """
    settings, facts = runs.read_config(run)
    if device is not None:
        settings = replace(settings, device=device)
    accelerator = create_accelerator(settings, training=False)
    model = load_run(run, weights)
    side = settings.img_size or input_size(settings.model)
    if img_size is not None and img_size != side:
        model, side = resample_tokens(model, img_size=img_size), img_size
        teacher = teacher_of(model)
        if teacher is not None:
            resample_tokens(teacher, img_size=img_size)
    changed: dict[str, Any] = {"img_size": side, "num_classes": facts["num_classes"], "classes": class_names(facts)}
    changed |= {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    given = {"batch_size": batch_size, "workers": workers}
    changed |= {name: value for name, value in given.items() if value is not None}
    if data is not None:
        changed["whole"] = not same_data(data, settings.data)
        settings = replace(settings, data=data, **OTHER_DATA | {"data_dir": settings.data_dir})
    loaded = load_data(data_options(settings, **changed))
    if loaded.in_chans != facts["in_chans"]:
        raise ValueError(f"{data} has {loaded.in_chans} channels, the model takes {facts['in_chans']}")
    measured = evaluate(model.to(accelerator.device), loaded.eval, accelerator)
    result = {"run": str(run), "weights": weights, "data": settings.data, "img_size": side, **measured}
    said = runs.keep_measured(run, {runs.EVAL: result}) if accelerator.is_main_process else ""
    return result | {"said": said}
