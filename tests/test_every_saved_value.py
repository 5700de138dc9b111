"""Every value of a config.json replaced by what it can't be, or left out: status 0, or one line and status 2.

The files are those of a run, of a saved model and of a detector's run, so that a new setting is covered.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karat import cli, runs
from karat.analyze import report
from karat.detect import measure as detections
from karat.detect.settings import DetectSettings
from karat.detect.task import train
from karat.runs import files, saved
from karat.runs.classification import Settings
from karat.share.hub.runs import from_run
from karat.train import engine, measure
from support.detection import tiny, write_coco
from support.pictures import images

GONE = object()
VALUES = (None, "x", -1, [], {"a": [1]}, math.nan, 10**400, True, [None], "", GONE)
READERS: dict[str, Any] = {
    "run": lambda folder: runs.read_config(folder, Settings),
    "saved": saved.read_config,
    "detector": lambda folder: runs.read_config(folder, DetectSettings),
}
LINES = {
    "run": (
        "eval FOLDER",
        "train --resume FOLDER",
        "predict FOLDER IMAGE",
        "hub FOLDER --output OUT --overwrite",
        "report FOLDER",
        "convert FOLDER",
    ),
    "saved": ("predict FOLDER IMAGE", "eval FOLDER", "train --init FOLDER --output OUT"),
    "detector": (
        "detect eval FOLDER",
        "detect train --resume FOLDER",
        "detect predict FOLDER IMAGE --output OUT",
        "detect compare FOLDER --output OUT",
        "report FOLDER",
    ),
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within a document, and to those within it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield at
    for key, one in inner:
        yield from places(one, (*at, key))


def put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place, or without it."""
    if not place:
        return value
    changed = copy.deepcopy(document)
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    if value is GONE:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return changed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, softmax_run: Path) -> Path:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("values")
    shutil.copytree(softmax_run, root / "run")
    from_run(root / "run").save_pretrained(root / "saved")
    train(tiny(write_coco(root / "coco"), root / "detector", epochs=1))
    images(root / "pictures", 1)
    return root


@pytest.fixture
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the reading: training, measuring, drawing."""

    def ends(*arguments: Any, **values: Any) -> Any:
        raise ValueError("this would have begun")

    for owner, name in (
        (engine.Trainer, "fit"),
        (report, "build_report"),
        (measure, "load_data"),
        (detections, "load_data"),
    ):
        monkeypatch.setattr(owner, name, ends)


def outcome(line: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(line)
    return status, err.getvalue()


@pytest.mark.usefixtures("nothing_long")
@pytest.mark.parametrize("kind", LINES)
def test_no_value_of_a_config_is_a_traceback(made: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(made / kind, tmp_path / kind)
    words = {"FOLDER": str(folder), "OUT": str(tmp_path / "out"), "IMAGE": str(next(made.glob("pictures/**/*.png")))}
    config = folder / runs.CONFIG
    document = json.loads(config.read_text())
    for turn, place in enumerate(places(document)):
        for value in VALUES if place else VALUES[:-1]:
            config.write_text(json.dumps(put(document, place, value)))
            with contextlib.suppress(ValueError):
                READERS[kind](folder)
        if place[:2] != ("training", "settings") or turn % 9 == 0:  # which are told, and not used
            value = VALUES[turn % (len(VALUES) - (not place))]
            config.write_text(json.dumps(put(document, place, value)))
            line = LINES[kind][turn % len(LINES[kind])].split()
            status, said = outcome([words.get(word, word) for word in line])
            assert status in (0, 2), (place, value, line, said)
            assert status == 0 or said.count("\n") == 1, (place, value, line, said)


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("text", ['{"a":' * 200 + "1" + "}" * 200, "[" * 100_000, '{"format": ' + "1" * 5000 + "}"])
def test_a_config_that_no_one_wrote_is_named(made: Path, tmp_path: Path, kind: str, text: str) -> None:
    folder = shutil.copytree(made / kind, tmp_path / kind)
    (folder / runs.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        READERS[kind](folder)


FACTS: list[tuple[str, str, Any, str]] = [
    ("run", "in_chans", GONE, "in_chans=None"),
    ("run", "num_classes", GONE, "num_classes=None"),
    ("run", "num_classes", "10", "num_classes='10'"),
    ("run", "class_names", ["a", None], "class_names="),
    ("run", "class_names", ["a", {"b": 1}], "class_names="),
    ("run", "class_names", ["a", "b"], "2 class_names for num_classes=10"),
    ("run", "versions", {"torch": [1]}, "versions="),
    ("run", "init", [1], "init="),
    ("saved", "class_names", [None] * 10, "class_names="),
    ("saved", "training", {"results": {"top1": "high"}}, "results: give a number"),
    ("saved", "training", {"versions": [1]}, "versions: give a table"),
    ("detector", "categories", GONE, "categories=None"),
    ("detector", "train_images", -1, "train_images=-1"),
    ("detector", "skipped", 3, "skipped=3"),
]


@pytest.mark.parametrize(("kind", "name", "value", "words"), FACTS)
def test_a_wrong_fact_is_named(made: Path, tmp_path: Path, kind: str, name: str, value: Any, words: str) -> None:
    document = files.read_json(made / kind / runs.CONFIG)
    files.write_json(tmp_path / runs.CONFIG, put(document, (name,), value))
    with pytest.raises(ValueError, match=f"config.json.*{words}"):
        READERS[kind](tmp_path)
