"""Students as runs: trained by one command, resumed, evaluated without the teacher's folder; the rows of Table 4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from karat import cli, runs
from karat.analyze.analyses.cost import analyse_cost
from karat.analyze.loading import open_run
from karat.models.flops import multiply_adds, teacher_multiply_adds
from karat.models.transfer import teacher_of
from karat.paper import compare, rows, run_row
from karat.runs import files
from karat.runs.classification import Settings
from karat.runs.model import load_run
from karat.study.compare import count_operations
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from support.training import outcome, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "g3b"
    train(tiny(folder, attention="g3b", epochs=1))
    return folder


def test_one_command_trains_evaluates_and_resumes(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    assert cli.main(["transfer", "mine", "--epochs", "2", "--model-ema-decay", "0.9"]) == 0
    run = tmp_path / "runs" / "digits-vit_tiny_patch16_224-from-mine-s0"
    settings, _ = runs.read_config(run)
    assert (settings.attention, settings.teacher) == ("softmax", "mine")
    assert (settings.embed_dim, settings.data_fraction, settings.recipe.batch_size) == (16, 0.1, 16)
    shutil.rmtree(mine)  # the run keeps what it needs
    last = runs.read_history(run)[-1]
    for weights, metric in (("last", "top1"), ("ema", "ema_top1")):
        assert cli.main(["eval", str(run), "--weights", weights]) == 0
        assert json.loads((run / "eval.json").read_text())["top1"] == last[metric]
    assert cli.main(["eval", str(run), "--img-size", "16"]) == 0  # the teacher is resampled too
    assert cli.main(["train", "--resume", str(run)]) == 0
    again = load_run(run)
    (theirs,) = [teacher_of(again)]
    assert theirs is not None
    for name, tensor in files.read_tensors(teacher / "model.safetensors").items():
        assert torch.equal(theirs.state_dict()[name], tensor)
    weights = files.read_tensors(run / "model.safetensors")
    assert not [name for name in weights if "qkv" in name or "operator" in name]
    capsys.readouterr()


class CutOff(BaseException):
    """Stands for the process's death."""


class Doomed(Trainer):
    def after_step(self) -> None:
        if self.progress.step == 7:
            raise CutOff


def test_cut_off_and_resumed_ends_bit_equal_whatever_became_of_the_teacher(tmp_path: Path, teacher: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    values = {"teacher": str(mine), "epochs": 2, "recovery_interval": 3, "mixup": 0.8, "model_ema_decay": 0.9}
    train(tiny(tmp_path / "whole", **values))
    with pytest.raises(CutOff):
        Doomed(Classification(), tiny(tmp_path / "run", **values)).fit()
    train(tiny(mine, attention="g3b", epochs=1, seed=5, overwrite=True))
    train(tiny(tmp_path / "run", resume="auto", **values))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    # begun again, the run takes the teacher as it is now
    train(tiny(tmp_path / "run", overwrite=True, **values))
    assert outcome(tmp_path / "run") != outcome(tmp_path / "whole")


def test_a_small_teacher_into_a_larger_student_of_other_depth(tmp_path: Path, teacher: Path) -> None:
    run = tmp_path / "run"
    line = ["--num-heads", "4", "--embed-dim", "32", "--depth", "4", "--epochs", "1", "--output", str(run)]
    assert cli.main(["transfer", str(teacher), *line, "--recipe", "vit", "--grad-checkpointing"]) == 0
    settings, facts = runs.read_config(run)
    assert (settings.preset, settings.recipe.mixup, settings.depth) == ("vit", 0.8, 4)
    assert facts["parameters"] == sum(p.numel() for p in load_run(run).parameters())
    student = tmp_path / "grandchild"  # a student may teach
    assert cli.main(["transfer", str(run), "--epochs", "1", "--output", str(student)]) == 0
    assert runs.is_run(student / "teacher" / "teacher")
    load_run(student)


def test_it_starts_from_weights_that_have_queries_and_keys(tmp_path: Path, teacher: Path) -> None:
    Trainer(Classification(), tiny(tmp_path / "run", teacher=str(teacher), init=str(teacher)))
    (fate,) = [f for f in runs.read_config(tmp_path / "run")[1]["init"] if f["part"] == "blocks: attn"]
    assert fate["fate"] == "loaded"
    train(tiny(tmp_path / "student", teacher=str(teacher), epochs=1))
    Trainer(Classification(), tiny(tmp_path / "tuned", init=str(tmp_path / "student")))


def test_a_tampered_teacher_and_wrong_use_are_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(run, teacher=str(teacher), epochs=1))
    weights = files.read_tensors(run / "teacher" / "model.safetensors")
    files.write_tensors(run / "teacher" / "model.safetensors", {n: t + 1 for n, t in weights.items()})
    with pytest.raises(ValueError, match=r"teacher/model\.safetensors is refused"):
        load_run(run)
    bad = {
        "": "name the teacher's run first",
        f"{tmp_path}/nowhere": "no run's folder",
        f"{teacher} --attention g3b": "leave --attention out",
        f"{teacher} --num-heads 1": "multiple of 2",
        f"{teacher} --model resnet18": "can't be built with",
        f"{teacher} --model deep_kan": "has no attention that another can take the place of",
    }
    for line, message in bad.items():
        assert cli.main(["transfer", *line.split()]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_what_a_run_starts_from_is_never_overwritten(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    (tmp_path / "link").symlink_to(mine)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    for start in ({"teacher": str(tmp_path / "link")}, {"init": str(mine)}, {"init": f"{mine}/model.safetensors"}):
        with pytest.raises(ValueError, match="is what this run starts from: give another --output"):
            Trainer(Classification(), tiny(mine, overwrite=True, **start))
    assert cli.main(["transfer", str(mine), "--output", str(mine), "--overwrite"]) == 2
    assert "give another --output" in capsys.readouterr().err
    (mine / runs.CONFIG).unlink()  # no run, and yet a new one would write in the place of its files
    for start in ("model.safetensors", "checkpoints"):
        with pytest.raises(ValueError, match="is what this run starts from: give another --output"):
            Trainer(Classification(), tiny(mine, init=str(mine / start)))
    (mine / runs.CONFIG).write_bytes(before[mine / runs.CONFIG])
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    settings = runs.read_config(mine)[0].as_dict() | {"attention": "softmax", "teacher": str(mine)}
    config = files.read_json(mine / "config.json")
    files.write_json(mine / "config.json", config | {"settings": settings})
    with pytest.raises(ValueError, match="names itself as its teacher"):
        load_run(mine)


def test_a_student_goes_on_with_its_own_teacher_only(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(run, teacher=str(teacher), epochs=1))
    assert cli.main(["transfer", str(tmp_path / "other"), "--resume", str(run)]) == 2
    assert f"learns from {teacher}, not" in capsys.readouterr().err
    assert cli.main(["transfer", str(teacher), "--resume", str(teacher)]) == 2
    assert "has no teacher" in capsys.readouterr().err
    for same in (teacher, run / "teacher"):
        assert cli.main(["transfer", str(same), "--resume", str(run)]) == 0
    assert cli.main(["convert", str(run), "--output", str(tmp_path / "made")]) == 2
    assert "nothing to convert" in capsys.readouterr().err


def test_a_student_elsewhere(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(teacher, mine)
    settings = tiny(run, teacher=str(mine), epochs=1)
    train(settings)
    own, image = count_operations(settings, 10, 1), torch.zeros(1, 1, 8, 8)
    theirs = teacher_multiply_adds(load_run(run), image)
    plain = count_operations(tiny(tmp_path, epochs=1), 10, 1)
    # two blocks without queries, keys (5 x 16 to 16 each) and scores (2 heads of 5 x 8 x 5)
    assert plain - own == 2 * (2 * 5 * 16 * 16 + 2 * 5 * 8 * 5)
    shutil.rmtree(mine)  # the run keeps what it needs
    assert multiply_adds(load_run(run), image) == own + theirs
    for line in (["hub", str(run)], ["predict", str(run), "x.png"], ["export", str(run)]):
        assert cli.main(line) == 2
        error = capsys.readouterr().err
        assert "runs on the attention of its teacher" in error
        assert error.count("\n") == 1
    assert cli.main(["report", str(run), "--sections", "cost"]) == 0
    samples = SimpleNamespace(images=image)
    rows = analyse_cost([SimpleNamespace(run=open_run(run), label="student", samples=samples)]).numbers  # type: ignore[list-item]
    assert rows["student"]["of the multiply-adds, the teacher's (M)"] == theirs / 1e6
    assert rows["the same with softmax"]["multiply-adds an image (M)"] == plain / 1e6


def test_rows_of_table_4_run(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(e for e in rows(4) if e.model == "vit_base" and "vit_tiny" in e.variant)
    assert entry.runnable == (True, "")
    assert entry.command.startswith("karat transfer runs/paper/cifar10-vit_tiny_patch16_224-g3b --model vit_base_")
    with pytest.raises(ValueError, match=r"learns from a run of vit_tiny_patch16_224 .*--teacher"):
        run_row(entry, 0.01)
    calls: list[list[str]] = []

    def transfer(arguments: list[str]) -> None:
        calls.append(list(arguments))
        (tmp_path / "run").mkdir()
        runs.write_history(tmp_path / "run", [{"epoch": 1, "top1": 12.5, "top5": 50.0}])

    monkeypatch.setattr("karat.train.commands.transfer", transfer)
    extra = {"--teacher": str(teacher), "--output": str(tmp_path / "run")}
    assert run_row(entry, 0.01, extra) == {"top1": 12.5, "top5": 50.0}
    assert calls[0][0] == str(teacher)
    assert "--teacher" not in calls[0]


def test_results_of_students_find_the_rows_of_their_teacher(tmp_path: Path) -> None:
    common = {"model": "vit_tiny_patch16_224", "data": "torch/cifar10", "recipe": "vit"}
    run = tmp_path / "run"
    for folder, values in ((run, {"teacher": "elsewhere"}), (run / "teacher", {"attention": "g3b"})):
        folder.mkdir()
        runs.begin(folder, Settings.make(**common, **values), {"num_classes": 10, "in_chans": 3})
    runs.write_history(run, [{"epoch": 1, "top1": 70.0, "top5": 90.0}])
    found = compare(rows(), [run])
    assert {(entry.table, entry.variant) for entry, _ in found} == {(4, "softmax<-vit_tiny+g3b")}
