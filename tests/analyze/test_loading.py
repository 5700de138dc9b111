"""Runs as they are opened: their labels, and which images they stand for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from karat import runs
from karat.analyze.analyses import analysis_of
from karat.analyze.analysis import Analysis
from karat.analyze.loading import open_run
from karat.analyze.report import _pictures
from karat.analyze.subject import Options, Subject, open_subjects
from karat.data.splits import load_data
from karat.runs.classification import Settings
from karat.runs.model import data_options


def untrained(folder: Path, **values: object) -> Path:
    settings = Settings.make(data="digits", **values)
    runs.begin(folder, settings, {"num_classes": 10, "in_chans": 1})
    return folder


@pytest.mark.parametrize(
    "names", [["a/run", "b/run"], ["a/x/run", "b/x/run"], ["a/run 1", "a/run-1"], ["x", "y", "x/y"]]
)
def test_no_two_runs_or_their_files_are_called_alike(names: list[str], tmp_path: Path) -> None:
    folders = [untrained(tmp_path / name, attention="g3b") for name in [*names, "other"]]
    shutil.rmtree(folders[-1])
    untrained(folders[-1], attention="softmax")
    subjects = open_subjects(folders, Options())
    assert len({s.label for s in subjects}) == len({s.key for s in subjects}) == len(folders)
    assert all(s.label.startswith("g3b (") for s in subjects[:-1]) or " " in names[0]
    assert subjects[-1].label.startswith("softmax")
    assert open_subjects(folders[:1], Options())[0].label == "g3b"


def test_a_run_by_two_names_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for other in (tmp_path / "link", tmp_path / "run" / ".." / "run", Path()):
        with pytest.raises(ValueError, match="named twice"):
            open_subjects([run, other], Options())
    untrained(tmp_path / "second")
    labels = [s.label for s in open_subjects([Path(), tmp_path / "second"], Options())]
    assert labels == ["softmax (run)", "softmax (second)"]


def test_samples_are_those_that_were_trained_on_or_held_out(tmp_path: Path) -> None:
    run = open_run(untrained(tmp_path / "run", held_out=20, data_fraction=0.1))
    trained_on = load_data(data_options(run.settings)).counts["train_images"]
    train, held_out = (run.samples(1000, split) for split in ("train", "eval"))
    assert (len(train.labels), len(held_out.labels)) == (trained_on, 20)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not seen & {image.numpy().tobytes() for image in held_out.images}
    few = {image.numpy().tobytes() for image in run.samples(7, "train").images}
    assert len(few) == 7
    assert few < seen
    whole = open_run(untrained(tmp_path / "whole"))
    assert len(whole.samples(7).labels) == 7
    assert len(whole.samples(2000, "train").labels) == load_data(data_options(whole.settings)).counts["train_images"]


def test_a_reports_pictures_are_of_the_run_that_they_are_named_after(tmp_path: Path) -> None:
    run = open_run(untrained(tmp_path / "run"))
    subjects = [Subject(run, label, Options()) for label in ("dog-b", "silu+dog-b")]
    figures = {f"maps-{s.key}": Figure() for s in subjects}
    (kind,) = _pictures(Analysis("attention", figures=figures), subjects)
    assert [picture.name for picture in kind] == ["maps, dog b", "maps, silu+dog b"]


def test_a_sweep_keeps_models_and_other_trainings_apart(tmp_path: Path) -> None:
    trained = {
        "a": {"attention": "g1b", "lr": 1e-3},
        "b": {"attention": "g3b", "lr": 2e-3},  # a rate of its own, as trials choose it
        "c": {"attention": "g3b", "lr": 2e-3, "seed": 1},
        "d": {"attention": "g3b", "lr": 2e-3, "epochs": 7},
        "e": {"attention": "g1b", "lr": 1e-3, "depth": 1},
    }
    for number, (name, values) in enumerate(trained.items()):
        untrained(tmp_path / name, **values)
        runs.write_history(tmp_path / name, [{"epoch": 1, "top1": 10.0 * number}])
    find = analysis_of("sweep")
    first = find(open_subjects([tmp_path / name for name in "abc"], Options())).numbers["lines"]
    assert first == {"": {"mean": (0.0, 15.0), "deviation": (None, pytest.approx(50**0.5))}}
    lines = find(open_subjects([tmp_path / name for name in trained], Options())).numbers["lines"]
    means = {name: line["mean"] for name, line in lines.items()}
    assert means == {
        "depth 3, epochs 30": (0.0, 15.0),
        "depth 3, epochs 7": (None, 30.0),
        "depth 1, epochs 30": (40.0, None),
    }
