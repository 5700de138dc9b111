"""Files that are whole or absent, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from karat import runs
from karat.runs import checkpoint, files
from karat.runs.model import load_run
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from support.interrupted import CutOff, Doomed
from support.training import tiny


def some_checkpoint(step: int = 3) -> checkpoint.Checkpoint:
    weights = {"w": torch.arange(6.0).reshape(2, 3)}
    return checkpoint.Checkpoint(weights, {"w/exp_avg": torch.ones(2, 3)}, None, {"step": step, "best": {}})


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = checkpoint.write(tmp_path / "run", some_checkpoint(), keep=2)
    again = checkpoint.read(path)
    assert again.state == {"step": 3, "best": {}}
    assert again.ema is None
    torch.testing.assert_close(again.model["w"], torch.arange(6.0).reshape(2, 3), rtol=0, atol=0)
    torch.testing.assert_close(again.optimizer["w/exp_avg"], torch.ones(2, 3), rtol=0, atol=0)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, files.MANIFEST])
def test_every_torn_file_is_noticed(tmp_path: Path, name: str) -> None:
    checkpoint.write(tmp_path, some_checkpoint(3), keep=2)
    newest = checkpoint.write(tmp_path, some_checkpoint(4), keep=2)
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[:-3])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    saved, refused = found
    assert saved.state["step"] == 3
    assert name in refused[0]


@pytest.mark.parametrize("table", [{}, [], {"model.safetensors": 3}, {"model.safetensors": {"bytes": 1}}], ids=str)
def test_a_manifest_that_is_none_is_refused(table: object, tmp_path: Path) -> None:
    newest = checkpoint.write(tmp_path, some_checkpoint(), keep=2)
    files.write_json(newest / files.MANIFEST, table)
    with pytest.raises(ValueError, match=r"manifest\.json is not a table of files"):
        checkpoint.newest(tmp_path)


def test_missing_file_is_noticed(tmp_path: Path) -> None:
    newest = checkpoint.write(tmp_path, some_checkpoint(), keep=2)
    (newest / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is missing"):
        checkpoint.newest(tmp_path)


def test_a_run_resumed_from_before_drops_the_refused_checkpoints_after_it(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        checkpoint.write(tmp_path, some_checkpoint(step), keep=5)
    checkpoint.write(tmp_path, some_checkpoint(5), keep=5)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["step-00000003", "step-00000005"]


def test_full_disk_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the system refuses the same write with the same kind of error."""
    trainer = Trainer(Classification(), tiny(tmp_path / "run"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if trainer.progress.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    trainer.after_step = fill  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match=r"could not be saved .*; .*step-\d+ is whole"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run" / checkpoint.FOLDER).glob(".*"))
    train(tiny(tmp_path / "run", resume="auto"))
    train(tiny(tmp_path / "whole"))
    left, right = load_run(tmp_path / "run"), load_run(tmp_path / "whole")
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_in_the_place_of_another_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, some_checkpoint(), keep=1)

    def cut_off(path: Path, **options: object) -> None:
        remove(path)
        raise CutOff

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(CutOff):
        checkpoint.write(tmp_path, some_checkpoint(), keep=1)
    assert checkpoint.newest(tmp_path) is not None


def test_what_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    def cut_off() -> None:
        with files.draft_of(tmp_path / "x") as draft:
            draft.write_text("ne")
            raise KeyboardInterrupt

    files.write_text(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_the_draft_of_a_killed_process_is_no_way_into_the_file_that_it_links(tmp_path: Path) -> None:
    for name in ("kept", "new"):
        files.write_text(tmp_path / name, name)
    with files.draft_of(tmp_path / "target") as draft:
        draft.write_text("old")
    draft.hardlink_to(tmp_path / "kept")  # a process of the same number had got so far
    files.write_text(tmp_path / "target", "new")
    assert [(tmp_path / name).read_text() for name in ("kept", "target")] == ["kept", "new"]


def test_weights_that_do_not_fit_are_refused_by_the_first_difference() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    good = model.state_dict()
    with pytest.raises(ValueError, match=r"file does not fit the model: '0.bias' is missing"):
        checkpoint.load_weights(model, {"0.weight": good["0.weight"]}, "file")
    with pytest.raises(ValueError, match=r"'0.weight' is \(3, 2\) there, \(2, 3\) in the model"):
        checkpoint.load_weights(model, {**good, "0.weight": torch.zeros(3, 2)}, "file")
    with pytest.raises(ValueError, match=r"'1.weight' has no place"):
        checkpoint.load_weights(model, {**good, "1.weight": torch.zeros(1)}, "file")


def test_tampered_weights_of_a_run_are_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=1))
    assert load_run(tmp_path / "run").training is False
    weights = files.read_tensors(tmp_path / "run" / checkpoint.MODEL)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    files.write_tensors(tmp_path / "run" / checkpoint.MODEL, weights)
    for noted in (files.read_json(tmp_path / "run" / runs.DIGESTS), {}):
        files.write_json(tmp_path / "run" / runs.DIGESTS, noted)
        with pytest.raises(ValueError, match=r"model\.safetensors is refused: its SHA-256"):
            runs.read_weights(tmp_path / "run")


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path: Path) -> None:
    """Of this version and those before, in every folder of a run; never what a running process writes or a user has."""
    gone = [".karat-999999999.metrics.jsonl", ".999999999.config.json", ".metrics.jsonl.ab12.tmp"]
    gone += ["trajectory/.karat-999999999.epoch-1.safetensors"]
    kept = [
        "config.json",
        "metrics.jsonl",
        ".999999999.notes",
        ".mine.tmp",
        f".karat-{os.getpid()}.eval.json",
        ".karat-notes",
    ]
    for name in gone + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / ".step-00000001.tmp").mkdir(parents=True)
    runs.tidy(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_is_trained_by_one_process(tmp_path: Path) -> None:
    settings = {"epochs": 1, "recovery_interval": 3}
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = 4
    with pytest.raises(CutOff):
        doomed.fit()
    (held, tell), (wait, end) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        with runs.claimed(tmp_path / "run"):
            os.write(tell, b"x")
            os.read(wait, 1)
        os._exit(0)
    os.read(held, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for how in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(ValueError, match="run is trained by another process now"):
            Trainer(Classification(), tiny(tmp_path / "run", **settings, **how))
    assert {path: path.read_bytes() for path in before} == before
    os.write(end, b"x")
    os.waitpid(child, 0)
    assert train(tiny(tmp_path / "run", resume="auto", **settings))["finished"]


def _claims(folder: Path) -> bool:
    """Whether another process may claim it."""
    if not (child := os.fork()):
        try:
            with runs.claimed(folder):
                os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_a_claim_is_not_lost_by_opening_the_file_once_more(tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", {"settings": {}})
    with runs.claimed(tmp_path):
        assert runs.holds_settings(tmp_path)
        assert not _claims(tmp_path)
        with pytest.raises(ValueError, match="by another process now"), runs.claimed(tmp_path):
            pass
        assert not _claims(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert _claims(tmp_path)


def test_a_claim_and_one_of_an_earlier_version_exclude_each_other(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    with config.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not _claims(tmp_path)
    with runs.claimed(tmp_path), config.open("r+b") as file, pytest.raises(OSError, match="unavailable"):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_claim_ends_with_a_killed_process_though_its_workers_live(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (held, tell), (wait, end) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        with runs.claimed(tmp_path):
            if os.fork():
                os.write(tell, b"x")
            os.close(end)
            os.read(wait, 1)  # until the test is over
        os._exit(0)
    os.read(held, 1)
    assert not _claims(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert _claims(tmp_path)
    os.close(end)


def test_checkpoints_that_stay_are_no_new_runs(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=1))
    (tmp_path / "run" / checkpoint.FOLDER).rename(tmp_path / "elsewhere")
    (tmp_path / "run" / checkpoint.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="checkpoints can't be removed, perhaps it is a link"):
        train(tiny(tmp_path / "run", epochs=1, overwrite=True))
    assert runs.is_run(tmp_path / "run")


def test_what_cannot_be_removed_stands_in_no_ones_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, unlink = tmp_path / ".karat-999999999.other", Path.unlink
    left.write_text("x")

    def refused(path: Path, **options: bool) -> None:
        if path == left:
            raise PermissionError
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    files.write_text(tmp_path / "file", "y")
    assert (tmp_path / "file").read_text() == "y"


def test_a_write_removes_drafts_of_killed_processes_beside_it(tmp_path: Path) -> None:
    (tmp_path / ".karat-999999999.other").write_text("x")
    files.write_text(tmp_path / "file", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_pickle_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        files.read_tensors(tmp_path / "weights.safetensors")


def test_json_keeps_every_bit_of_a_float(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-320, 1.7976931348623157e308]
    files.write_json(tmp_path / "x.json", values)
    assert files.read_json(tmp_path / "x.json") == values


def test_config_with_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=1))
    config = json.loads((tmp_path / "run" / runs.CONFIG).read_text())
    config["settings"]["warp"] = 9
    (tmp_path / "run" / runs.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'warp'"):
        runs.read_config(tmp_path / "run")
