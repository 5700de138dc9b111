"""A run's folder: config.json, metrics.jsonl, weights, checkpoints; how it is named, opened and trusted."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor

from karat.runs import checkpoint, files
from karat.runs.classification import Settings
from karat.runs.settings import RunSettings, data_slug, first_change, slug
from karat.values import Folder, convert

CONFIG, METRICS, SUMMARY, DIGESTS = "config.json", "metrics.jsonl", "summary.json", "weights.json"
EVAL, DETECTIONS = "eval.json", "detections.json"
COMPARISON = "compare.json"  # of several runs
REPORT = "convert.json"  # of a converted run
TRAJECTORY, TEACHER, TENSORBOARD, PREDICTIONS = "trajectory", "teacher", "tensorboard", "predictions"
_FOLDERS = (checkpoint.FOLDER, TRAJECTORY, TEACHER, TENSORBOARD, PREDICTIONS)
_FILES = (METRICS, SUMMARY, DIGESTS, checkpoint.MODEL, checkpoint.EMA, EVAL, DETECTIONS, REPORT, CONFIG)

_CLAIMS: set[FileIO] = set()  # config.json of the runs that this process has claimed

S = TypeVar("S", bound=RunSettings)


def default_folder(settings: RunSettings) -> Path:
    """Below runs, named as the settings say."""
    return Path("runs") / settings.folder_name()


def compare_folder(settings: RunSettings) -> Path:
    """runs/compare-DATA-MODEL."""
    return Path("runs") / f"compare-{data_slug(settings.data)}-{slug(settings.model)}"


def choose_folder(settings: RunSettings, default: Path) -> Path:
    """Where a run goes: --resume's or --output's folder, else `default`, with a number where that is taken.

    With --resume auto the last one that is there is taken; with --overwrite the first. Raises ValueError when
    --resume names no run, or --output holds a run and neither --resume nor --overwrite is given.
    """
    if settings.resume not in (None, "auto"):
        folder = Path(str(settings.resume))
        if not is_run(folder):
            raise ValueError(f"--resume {folder}: no run is there (it has no {CONFIG})")
        if settings.output is not None and settings.output.resolve() != folder.resolve():
            raise ValueError(f"--resume {folder} and --output {settings.output} differ: give one of them")
        return folder
    if settings.output is not None:
        convert("output", settings.output, Folder)
        if is_run(settings.output) and settings.resume is None and not settings.overwrite:
            raise ValueError(f"{settings.output} holds a run: --resume auto goes on with it, --overwrite begins again")
        return settings.output
    if settings.overwrite:
        return default
    taken, free = default, default
    for number in count(2):
        if not free.exists():
            break
        taken, free = free, default.with_name(f"{default.name}-{number}")
    return taken if settings.resume == "auto" else free


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / CONFIG).is_file()


def holds_weights(folder: Path | None) -> bool:
    """Whether a run was saved already: then how it started is past, and what it started from may be gone."""
    return folder is not None and bool(checkpoint.listed(folder))


def holds_settings(folder: Path) -> bool:
    """Whether a folder's config.json is a run's: others write files of that name too."""
    config = files.read_json(folder / CONFIG)
    return isinstance(config, dict) and "settings" in config


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("karat", "torch", "timm", "accelerate", "torchvision", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def spare(folder: Path, *sources: str | Path | None) -> None:
    """Raise ValueError where a new run in `folder` would remove what it starts from, or write in its place."""
    for source in sources:
        if source is None:
            continue
        path, target = Path(source).resolve(), folder.resolve()
        within = path.relative_to(target).parts[0] if target in path.parents else None
        if path == target or within in (*_FOLDERS, *_FILES):
            raise ValueError(f"{source} is what this run starts from: give another --output than {folder}")


def check_same(folder: Path, settings: RunSettings) -> None:
    """Raise ValueError where the run in `folder` can't go on under these settings."""
    saved, facts = read_config(folder, type(settings))
    if "converted_from" in facts:
        raise ValueError(f"{folder} was converted, not trained: start a new run with --init {folder}")
    change = first_change(saved, settings)
    if change is not None:
        raise ValueError(f"{folder} can't go on under other settings: {change}")


def changed_counts(folder: Path, settings: RunSettings, facts: Mapping[str, Any]) -> list[str]:
    """What to say where the data that a run goes on with has another number of images than when it began."""
    _, before = read_config(folder, type(settings))
    parts = {"train_images": "training", "eval_images": "evaluation"}
    return [
        f"{folder} began with {before[name]:,} {part} images, there are {facts[name]:,} now: what follows is another "
        "training than one without a break"
        for name, part in parts.items()
        if before.get(name) is not None and name in facts and before[name] != facts[name]
    ]


def begin(folder: Path, settings: RunSettings, facts: dict[str, Any]) -> None:
    """Make a run's folder, with its config; what another run left there is removed (`choose_folder` asked before)."""
    if is_run(folder):
        remove(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the run's folder {folder}: {error.strerror or error}") from error
    files.write_json(
        folder / CONFIG, {"task": settings.task, "settings": settings.as_dict(), "versions": versions(), **facts}
    )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within, no other process may train in a run's folder. Raises ValueError where one does.

    The system holds the claim, a lock on config.json as it is open here: it ends with the process, however that ends,
    and not where the process opens and closes the file once more. A network file system has such locks, or none, which
    is let pass. Earlier versions have a lock of the process on the same file; each excludes the other.
    """
    import fcntl  # no system without it makes a folder's entries last, as runs need

    _let_go_in_children()
    with (folder / CONFIG).open("r+b", buffering=0) as file:
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):  # Linux, where flock and locks of a process don't see each other
                whole = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # C's struct flock
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder} is trained by another process now: let it end, or give another --output"
            ) from None
        except OSError:  # of a file system without locks
            pass
        _CLAIMS.add(file)
        try:
            yield
        finally:
            _CLAIMS.discard(file)


@cache
def _let_go_in_children() -> None:
    """Once a process: what it forks, data workers say, holds no claim, which would last as long as they do."""

    def let_go() -> None:
        for file in _CLAIMS:
            file.close()

    os.register_at_fork(after_in_child=let_go)


def remove(folder: Path) -> None:
    """Remove what a run wrote, and nothing else that lies in its folder."""
    with claimed(folder):
        _sweep(folder)
        for name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        if checkpoint.listed(folder):  # a new run would go on from them
            raise OSError(f"{folder / checkpoint.FOLDER} can't be removed, perhaps it is a link: empty it first")
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what killed processes left half written in a run's folder. Raises ValueError where one trains there."""
    with claimed(folder):
        _sweep(folder)


def _sweep(folder: Path) -> None:
    for inner in (folder, *(folder / name for name in _FOLDERS)):
        files.sweep(inner, _FILES)
    for draft in (*folder.glob(".*.tmp"), *(folder / checkpoint.FOLDER).glob(".*.tmp")):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)


def _check_is_run(folder: Path) -> None:
    """ValueError for what holds no run, saying what it is instead where that can be told."""
    if folder.is_file():
        files.refuse_pickle(folder)
        raise ValueError(f"{folder} is a file, and the folder of a run is needed here; --init takes files of weights")
    if not is_run(folder):
        raise ValueError(f"{folder} is no run's folder: it has no {CONFIG}")


def task_of(folder: Path) -> str:
    """The task of a run, by its config.json; ValueError when it is no run's folder."""
    _check_is_run(folder)
    config = files.read_json(folder / CONFIG)
    return str(config.get("task", Settings.task)) if isinstance(config, dict) else Settings.task


@overload
def read_config(folder: Path) -> tuple[Settings, dict[str, Any]]: ...
@overload
def read_config(folder: Path, kind: type[S]) -> tuple[S, dict[str, Any]]: ...
def read_config(folder: Path, kind: type[Any] = Settings) -> tuple[Any, dict[str, Any]]:
    """A run's settings and the other facts of its config.json.

    Raises ValueError when it is no run's folder, or a run of another kind of task.
    """
    _check_is_run(folder)
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        other = "a saved model" if isinstance(config, dict) and "format" in config else "another program's"
        raise ValueError(
            f"{folder} is no run's folder: its {CONFIG} has no settings and is {other}; --init, karat predict and "
            "karat export take saved models"
        )
    task = config.get("task", Settings.task)
    facts = {key: value for key, value in config.items() if key not in ("settings", "task")}
    if task != kind.task:
        raise ValueError(f"{folder} is a run of the task {task!r}, and a run of `{kind.command}` is needed here")
    try:
        facts |= {name: convert(name, facts.get(name), needed) for name, needed in kind.facts.items()}
        facts = {name: fact for name, fact in facts.items() if fact is not None}
        settings = kind.from_dict(config["settings"])
        settings.check_facts(facts)
        return settings, facts
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not fit this version of karat: {error}") from None
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} does not fit this version of karat: it has no {error}") from None


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl: one line an epoch."""
    files.write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in history))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; ValueError names a malformed one."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
    return lines


def keep_measured(folder: Path, found: Mapping[str, Any]) -> str:
    """Write files of what was measured of a run, and say where, or why not: some runs may only be read."""
    try:
        for name, value in found.items():
            files.write_json(folder / name, value)
    except OSError as error:
        return f"not saved: {error}"
    return f"saved: {folder / next(iter(found))}"


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """The weights of a run that has no checkpoints, vouched for by their digest."""
    files.write_tensors(folder / checkpoint.MODEL, weights)
    files.write_json(folder / DIGESTS, {checkpoint.MODEL: [files.digest(folder / checkpoint.MODEL)]})


def publish_weights(folder: Path, saved: Path) -> None:
    """Put a checkpoint's weights at the top of the run. Their digests are noted first, so each file is vouched for."""
    names = [name for name in (checkpoint.MODEL, checkpoint.EMA) if (saved / name).exists()]
    known = files.read_json(folder / DIGESTS) if (folder / DIGESTS).exists() else {}
    manifest = files.read_json(saved / files.MANIFEST)
    # two digests a file: a run killed between the note and the copy has the older weights in place
    noted = {name: [manifest[name]["sha256"], *known.get(name, [])[:1]] for name in names}
    files.write_json(folder / DIGESTS, noted)
    for name in names:
        files.copy_file(saved / name, folder / name)


def weights_path(folder: Path, which: str) -> Path:
    """Where a run's weights lie: last, ema, or best (of the checkpoint with the highest top-1)."""
    if which != "best":
        return folder / (checkpoint.EMA if which == "ema" else checkpoint.MODEL)
    if "converted_from" in files.read_json(folder / CONFIG):
        raise ValueError(f"{folder} was converted, not trained: it has one set of weights, last")
    summary = files.read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    name = summary.get("best", {}).get("checkpoint")
    if name is None:
        raise ValueError(f"{folder} has no best checkpoint yet: its first epoch is not finished")
    return folder / checkpoint.FOLDER / str(name) / checkpoint.MODEL


def read_weights(folder: Path, which: str = "last") -> dict[str, Tensor]:
    """A run's weights, after their digest was checked; ValueError when they are missing, cut or tampered with."""
    path = weights_path(folder, which)
    if not path.is_file():
        remedy = "it was trained without EMA" if which == "ema" else "its first epoch is not finished"
        raise ValueError(f"{path} is not there: {remedy}")
    if which == "best":
        expected = [files.read_json(path.parent / files.MANIFEST)[path.name]["sha256"]]
    else:
        expected = files.read_json(folder / DIGESTS).get(path.name, [])
    found = files.digest(path)
    if found not in expected:
        noted = f"{expected[0][:12]}…" if expected else "none"
        raise ValueError(f"{path} is refused: its SHA-256 is {found[:12]}…, the run noted {noted}")
    return files.read_tensors(path)
