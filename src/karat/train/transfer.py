"""`karat transfer TEACHER_RUN`: a run whose model uses a trained teacher's attention (SPEC §4, Table 4).

The run is an ordinary one, with `teacher` among its settings. It keeps the teacher: RUN/teacher holds the teacher's
config.json and weights with their digest, so that evaluating, resuming or moving the run needs nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from karat.kan.peers import DEEP_KAN
from karat.train import checkpoint, files, runs
from karat.train.build import input_size
from karat.train.settings import AUTO, Settings
from karat.transfer import transfer_attention


def teacher_folder(settings: Settings, folder: Path | None) -> Path:
    """Where the teacher lies: in the run that keeps it, else where the settings say."""
    kept = None if folder is None else folder / runs.TEACHER
    return kept if kept is not None and runs.is_run(kept) else Path(str(settings.teacher))


def attach(model: nn.Module, settings: Settings, folder: Path | None, in_chans: int) -> nn.Module:
    """Give a student's blocks the attention of its teacher; ValueError where that is missing or does not fit."""
    from karat.train.measure import load_run

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


def keep(settings: Settings, folder: Path) -> None:
    """Copy the teacher into the run, whole or not at all; nothing to do where it is there already."""
    target, source = folder / runs.TEACHER, teacher_folder(settings, folder)
    if source == target:
        return
    draft = folder / f".{runs.TEACHER}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    _copy(source, draft)
    draft.rename(target)
    files.sync(folder)


def _copy(source: Path, target: Path) -> None:
    """What makes a folder a run that can be loaded; a teacher that had a teacher brings it along."""
    target.mkdir()
    for name in (runs.DIGESTS, checkpoint.MODEL, runs.CONFIG):
        files.copy_file(source / name, target / name)
    if runs.is_run(source / runs.TEACHER):
        _copy(source / runs.TEACHER, target / runs.TEACHER)


def student_defaults(teacher: Path, given: Sequence[str], model: str | None = None) -> Settings:
    """The settings of a student before its own options: the teacher's data, recipe and sizes, plain attention.

    given: the options that the command line sets; another --model, named by `model`, has its own width, depth and
    heads (a deep KAN no patches either), and with --data or --recipe the recipe is no longer the teacher's. Raises
    ValueError when `teacher` is no run.
    """
    saved, _ = runs.read_config(teacher)
    fresh = replace(
        saved,
        attention="softmax",
        teacher=str(teacher),
        init=None,
        output=None,
        resume=None,
        overwrite=False,
        num_classes=None,
    )
    if "model" in given:
        fresh = replace(fresh, embed_dim=None, depth=None, num_heads=None)
    if model is not None and model.partition("(")[0] == DEEP_KAN:
        fresh = replace(fresh, patch_size=None)
    if "data" in given:
        fresh = replace(fresh, data_fraction=1.0, data_dir=None, num_samples=None)
    return replace(fresh, preset=AUTO) if {"data", "recipe"} & set(given) else fresh
