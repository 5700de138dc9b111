"""The model of a run, as its settings describe it and as a run's folder holds it.

Building and loading stand together: a student's model is built around its teacher, which is loaded from a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm import get_pretrained_cfg, is_model
from torch import nn

from karat import runs
from karat.data.splits import DEFAULT_SIZE, DataOptions
from karat.models.create import create_model, rebuild_model
from karat.models.transfer import transfer_attention
from karat.runs.checkpoint import load_weights
from karat.runs.classification import Settings


def input_size(model: str) -> int:
    """The side of the images that timm's model of this name takes; 224 where it does not say."""
    name = model.partition("(")[0]  # deep_kan(order=5) has settings behind its name
    cfg = get_pretrained_cfg(name) if is_model(name.split(".")[0]) else None
    return cfg.input_size[-1] if cfg is not None else DEFAULT_SIZE


def data_options(settings: Settings, **changes: Any) -> DataOptions:
    """What a run reads, as its settings say, with some options changed."""
    s = settings
    options = DataOptions(
        s.data,
        s.recipe.augmentation,
        s.recipe.batch_size,
        img_size=s.img_size or input_size(s.model),
        workers=s.workers,
        seed=s.seed,
        on_bad_image=s.on_bad_image,
        num_classes=s.num_classes,
        data_dir=s.data_dir,
        fraction=s.data_fraction,
        num_samples=s.num_samples,
        held_out=s.held_out,
    )
    return replace(options, **changes)


def class_names(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes that a run notes in its config.json, in the order of its logits; None where it notes none."""
    return tuple(map(str, facts.get("class_names", ()))) or None


def plain_model(settings: Settings, num_classes: int, in_chans: int, *, saved: bool = False) -> nn.Module:
    """The model that the settings describe, with attention of its own.

    saved: its weights exist. Raises ValueError where they don't and patches don't divide the images.
    """
    recipe = settings.recipe
    extra: dict[str, Any] = settings.model_kwargs()
    if recipe.drop:
        extra["drop_rate"] = recipe.drop
    if recipe.drop_path:
        extra["drop_path_rate"] = recipe.drop_path
    if settings.attn_init is not None:
        extra["attn_init"] = settings.attn_init
    create = rebuild_model if saved else create_model
    return create(settings.model, attention=settings.attention, num_classes=num_classes, in_chans=in_chans, **extra)


def build_model(settings: Settings, num_classes: int, in_chans: int, folder: Path | None = None) -> nn.Module:
    """The model of a run, on the CPU, initialised from torch's present random state.

    folder: the run's, where it is there already: it keeps the teacher of a student.
    """
    model = plain_model(settings, num_classes, in_chans, saved=folder is not None)
    return with_teacher(model, settings, in_chans, folder)


def with_teacher(model: nn.Module, settings: Settings, in_chans: int, folder: Path | None) -> nn.Module:
    """The model with the attention of the settings' teacher in place of its own, where they name one.

    Raises ValueError where the teacher is missing or does not fit.
    """
    if settings.teacher is None:
        return model
    where = teacher_folder(settings, folder)
    if not runs.is_run(where):
        raise ValueError(f"the teacher {where} is no run's folder: train it first, or name another")
    if folder is not None and where.resolve() == folder.resolve():
        raise ValueError(f"{folder} names itself as its teacher: it was overwritten, train it again from another one")
    side = settings.img_size or input_size(settings.model)
    random = torch.get_rng_state()  # building the teacher draws weights that its own then replace
    teacher = load_run(where)
    torch.set_rng_state(random)
    return transfer_attention(model, teacher, torch.zeros(1, in_chans, side, side))


def load_run(folder: Path, weights: str = "last") -> nn.Module:
    """A run's model with its weights ("last", "best" or "ema"), in evaluation mode, on the CPU.

    Raises ValueError when the folder is no run, or its weights are missing or were tampered with.
    """
    settings, facts = runs.read_config(folder)
    model = build_model(settings, facts["num_classes"], facts["in_chans"], folder)
    load_weights(model, runs.read_weights(folder, weights), str(runs.weights_path(folder, weights)))
    return model.eval()


def teacher_folder(settings: Settings, folder: Path | None) -> Path:
    """Where the teacher lies: in the run that keeps it, else where the settings say."""
    kept = None if folder is None else folder / runs.TEACHER
    return kept if kept is not None and runs.is_run(kept) else Path(str(settings.teacher))
