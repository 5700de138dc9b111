"""`karat transfer TEACHER_RUN`: a run whose model uses a trained teacher's attention (SPEC §4, Table 4).

The run is an ordinary one, with `teacher` among its settings. It keeps the teacher: RUN/teacher holds the teacher's
config.json and weights with their digest, so that evaluating, resuming or moving the run needs nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from karat import runs
from karat.models.kan.peers import DEEP_KAN
from karat.runs import checkpoint, files
from karat.runs.classification import AUTO, OTHER_DATA, Settings
from karat.runs.model import teacher_folder


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
        attn_init=None,
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
        fresh = replace(fresh, **OTHER_DATA)
    return replace(fresh, preset=AUTO) if {"data", "recipe"} & set(given) else fresh
