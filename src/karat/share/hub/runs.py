"""From a training run to a model that can be saved and shared; and one way to open a model of any kind."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from karat import runs
from karat.data.images import statistics
from karat.runs import files
from karat.runs.classification import Settings
from karat.runs.model import class_names, input_size, load_run
from karat.runs.recipes import get_recipe
from karat.runs.saved import ModelConfig, is_saved
from karat.runs.settings import NOT_TOLD, told
from karat.share.hub.model import KArAtModel


def train_command(settings: Settings) -> str:
    """The `karat train` that gives these settings again, data and folders aside.

    >>> train_command(Settings.make(attention="g3b", epochs=5))
    'karat train --recipe digits --model vit_tiny_patch16_224 --attention g3b ... --epochs 5'
    """
    defaults = Settings(recipe=get_recipe(settings.preset))
    words = ["karat", "train", "--recipe", settings.preset]
    changed = [(settings, defaults, NOT_TOLD), (settings.recipe, defaults.recipe, frozenset[str]())]
    for mine, theirs, skipped in changed:
        for f in dataclasses.fields(mine):  # type: ignore[arg-type]  # both are dataclasses
            value = getattr(mine, f.name)
            if f.name not in skipped and value != getattr(theirs, f.name):
                words += _option(f.name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value)] if isinstance(value, tuple | list) else [f"--{flag}", str(value)]


def from_run(folder: Path, weights: str = "last") -> KArAtModel:
    """A run's model with its weights ("last", "best" or "ema"), ready to be saved; the facts for its card are in
    `config.training`.

    Raises ValueError when the folder is no run, its weights are missing or were tampered with, or it is a student,
    whose attention another model computes.
    """
    settings, facts = runs.read_config(folder)
    if settings.teacher is not None:
        raise ValueError(
            f"{folder} runs on the attention of its teacher, {settings.teacher}, without which it can't be saved or "
            "opened; karat eval measures it"
        )
    model = load_run(folder, weights)
    mean, std = statistics(facts["in_chans"])
    names = class_names(facts) or ()
    if names:  # --num-classes may ask for more than the data has
        names = (*names, *map(str, range(len(names), facts["num_classes"])))
    arguments = {name: value for name, value in settings.model_kwargs().items() if name != "mlp"}
    config = ModelConfig(
        settings.model,
        settings.attention,
        settings.mlp,
        num_classes=facts["num_classes"],
        in_chans=facts["in_chans"],
        img_size=settings.img_size or input_size(settings.model),
        model_args=arguments,
        class_names=names,
        mean=mean,
        std=std,
        crop_pct=settings.recipe.crop_pct,
        interpolation=settings.recipe.interpolation,
        training=_training(folder, settings, facts, weights),
    )
    return KArAtModel(config, model).eval()


def _training(folder: Path, settings: Settings, facts: dict[str, Any], weights: str) -> dict[str, Any]:
    history = runs.read_history(folder)
    line = history[-1] if history else {}
    if weights == "best":
        summary = files.read_json(folder / runs.SUMMARY)
        line = next(entry for entry in history if entry["epoch"] == summary["best"]["epoch"])
    if weights == "ema":
        results = {"top1": line["ema_top1"]} if "ema_top1" in line else {}
    else:
        results = {name: line[name] for name in ("top1", "top5") if name in line}
    return {
        "data": settings.data,
        "weights": weights,
        "epoch": line.get("epoch", 0),
        "epochs": settings.recipe.epochs,
        "results": results,
        "command": train_command(settings),
        "versions": facts.get("versions", {}),
        "settings": told(settings),
    }


def open_model(where: str | Path, weights: str = "last") -> KArAtModel:
    """A model from a run's folder, a saved model's folder or a name on the Hub, in evaluation mode.

    Raises ValueError as `from_run` and `karat.from_pretrained` do, and for `weights` other than "last" where there
    is but one set.
    """
    folder = Path(where)
    if runs.is_run(folder) and not is_saved(folder):
        return from_run(folder, weights)
    if weights != "last":
        raise ValueError(f"--weights {weights}: {where} is no run and has one set of weights only")
    return KArAtModel.from_pretrained(where)
