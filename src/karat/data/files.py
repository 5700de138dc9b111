"""Files of data below a folder: which there are, which part each one is of, and how `datasets` is to read them."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from karat.data.folder import EVALUATED, LeftOut, Tree, part_of
from karat.values import local_path


def find_files(root: Path, ending: str, tree: Tree | None = None) -> tuple[dict[Path, str], LeftOut]:
    """The files of one kind below a folder, hidden ones aside, each with the part that its name means."""
    kinds, left = {}, LeftOut()
    for folder, listing in (tree or Tree()).walk(str(root)):
        used = [name for name in listing.files if name.lower().endswith(ending)]
        left.count(folder, listing, used)
        for name in sorted(used):
            path = Path(folder) / name
            kinds[path] = _kind(path.relative_to(root))
    return dict(sorted(kinds.items())), left


def _kind(path: Path) -> str:
    """The part that a file's name means, or else that of a folder above it, by any word of it; "" by none.

    Raises ValueError where one name has words of two parts.
    """
    for name in reversed(path.parts):
        kinds = {kind for word in re.split(r"[-_. ]", name) if (kind := part_of(word))}
        if len(kinds) > 1:
            raise ValueError(f"{path}: {name!r} may mean {' or '.join(sorted(kinds))}; rename it")
        if kinds:
            return kinds.pop()
    return ""


def eval_kind(kinds: set[str]) -> str | None:
    """The part to evaluate on among those found: validation before test."""
    return next((name for name in EVALUATED if name in kinds), None)


def find_shards(pattern: str, *, whole: bool = False) -> dict[str, list[Path]]:
    """The shards of training and of evaluation. Raises ValueError where there are none of one part.

    whole: nobody trains; those of evaluation are both, all that there are where none is for evaluation.
    """
    if "::" in pattern:
        patterns = dict(zip(("train", "eval"), pattern.split("::", 1), strict=True))
        shards = {split: _matching(part) for split, part in patterns.items()}
    else:
        folder = local_path(pattern)
        found = [] if folder.is_dir() or not whole else _matching(pattern)
        kinds = find_files(folder, ".tar")[0] if folder.is_dir() else dict.fromkeys(found, "")
        chosen = eval_kind(set(kinds.values()))
        if whole and chosen is None:
            kinds, chosen = dict.fromkeys(kinds, "val"), "val"
        shards = {"train": [path for path, kind in kinds.items() if kind == "train"]}
        shards["eval"] = [path for path, kind in kinds.items() if kind and kind == chosen]
        if whole:
            shards["train"] = shards["eval"]
    for split, paths in shards.items():
        if not paths:
            raise ValueError(
                f"wds/{pattern}: no shards for {'training' if split == 'train' else 'evaluation'}; "
                "give a folder with *train*.tar and *validation*.tar, or wds/TRAIN_GLOB::EVAL_GLOB"
            )
    return shards


def _matching(pattern: str) -> list[Path]:
    """The files that a pattern means; a file of just that name, brackets and all, goes first."""
    path = local_path(pattern)
    return [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))


def load_files(kind: str, files: Sequence[Path], *, streaming: bool, **options: Any) -> Any:
    """Local files as `datasets` reads them, which takes paths for patterns."""
    import datasets

    odd = next((path for path in files if "::" in str(path) or os.path.expandvars(path) != str(path)), None)
    if odd is not None:
        raise ValueError(f"{odd}: datasets reads :: and variables within paths; rename the folder, or link to it")
    patterns = [glob.escape(os.path.abspath(path)) for path in files]
    with _quiet(datasets):
        return datasets.load_dataset(kind, data_files=patterns, split="train", streaming=streaming, **options)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars while local files are opened: it takes a moment."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
