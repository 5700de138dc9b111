"""Studies trained on a few digits: going on, several processes, the table, step times, what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from karat import cli, runs
from karat.analyze.loading import runs_in
from karat.study.document import parse_document
from karat.study.measures import read_measures
from karat.study.plan import Plan, common_settings, make_plan, summary_of
from karat.study.rows import make_rows
from karat.study.table import markdown
from karat.study.timing import read_times, settle
from karat.study.work import claimed, train_all
from support.processes import KARAT, Started

STUDY = """
title = "a few digits, [/not] markup"
seeds = 2

[settings]
data = "digits"
recipe = "quick"
img_size = 8
patch_size = 4
embed_dim = 16
depth = 2
num_heads = 2
data_fraction = 0.1
batch_size = 16
epochs = 2
warmup_epochs = 1
track = []
device = "cpu"

[[variants]]
attention = "softmax"

[[variants]]
name = "operator"
attention = "g1b,rank=2"

[[variants]]
name = "wide"
attention = "softmax"
embed_dim = 24
epochs = 3
seeds = 1
equal_time_to = "operator"
"""


def arguments(folder: Path, *more: str) -> list[str]:
    """karat compare --study of the file in a folder, which is written here."""
    (folder / "study.toml").write_text(STUDY)
    return ["compare", "--study", str(folder / "study.toml"), "--output", str(folder / "out"), *more]


def plan_in(folder: Path) -> Plan:
    import tomllib

    document = parse_document(tomllib.loads(STUDY))
    return make_plan(document, common_settings(document.settings), folder / "out")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study, trained once: its folder is out in this one."""
    folder = tmp_path_factory.mktemp("study")
    assert cli.main(arguments(folder)) == 0
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of the runs in a study's folder, but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for run in folder.glob("*-s?")
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_finished_runs_are_not_touched_and_missing_ones_trained(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(study / "out")
    assert cli.main(arguments(study)) == 0
    assert everything(study / "out") == before
    assert "epoch 1/" not in capsys.readouterr().out
    # a run that was killed between its last checkpoint and its summary is completed, not trained again
    summary = study / "out" / "wide-s0" / runs.SUMMARY
    kept = json.loads(summary.read_text())
    summary.unlink()
    assert cli.main(arguments(study)) == 0
    assert "epoch 1/" not in capsys.readouterr().out
    assert json.loads(summary.read_text()) == kept


def test_other_settings_are_refused_before_anything_is_trained(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = study / "out"
    before = everything(out) | {path.name: path.read_bytes() for path in out.glob("*.json")}
    for more in ([], ["--time", "--rounds", "1"], ["--only-table"]):
        assert cli.main(arguments(study, "--lr", "0.5", *more)) == 2
        assert "lr was" in capsys.readouterr().err
        assert everything(out) | {path.name: path.read_bytes() for path in out.glob("*.json")} == before


def test_a_model_that_cannot_be_built_leaves_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path, "--num-heads", "3")) == 2
    assert "variant 'softmax'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_against_numpy(study: Path) -> None:
    found = json.loads((study / "out" / "study.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    top1 = {name: [runs.read_history(Path(run))[-1]["top1"] for run in row["runs"]] for name, row in rows.items()}
    assert {name: len(values) for name, values in top1.items()} == {"softmax": 2, "operator": 2, "wide": 1}
    for name, row in rows.items():
        assert row["top1"]["mean"] == pytest.approx(np.mean(top1[name]))
        curves = [[line["top1"] for line in runs.read_history(Path(run))] for run in row["runs"]]
        np.testing.assert_allclose(row["curve"], np.mean(curves, axis=0))
    gap = rows["operator"]["difference"]
    deviations = [np.std(top1[name], ddof=1) for name in ("softmax", "operator")]
    pooled = np.sqrt(np.mean(np.square(deviations)))
    assert gap["difference"] == pytest.approx(np.mean(top1["operator"]) - np.mean(top1["softmax"]))
    assert gap["standard_error"] == pytest.approx(np.hypot(*deviations) / np.sqrt(2))
    assert gap["deviations"] == pytest.approx(gap["difference"] / pooled)
    (equal,) = rows["operator"]["at_equal_time"]
    assert equal["against"] == "wide"
    assert equal["difference"]["difference"] == pytest.approx(np.mean(top1["operator"]) - np.mean(top1["wide"]))
    assert rows["softmax"]["difference"] is None
    assert rows["wide"]["parameters"] > rows["operator"]["parameters"] > rows["softmax"]["parameters"]


def test_what_a_study_leaves(study: Path) -> None:
    out = study / "out"
    table, curves = ((out / "study.md").read_text() + "\n").split("\n\n")[:2]
    for text in (table, curves):
        lines = text.splitlines()
        assert len(lines) == 2 + 3
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    first = runs.read_history(out / "wide-s0")
    assert curves.splitlines()[-1] == "| wide | " + " | ".join(f"{line['top1']:.2f}" for line in first) + " |"
    plan = json.loads((out / "plan.json").read_text())
    assert [row["seeds"] for row in plan["variants"]] == [[0, 1], [0, 1], [0]]
    assert plan["variants"][2]["settings"]["embed_dim"] == 24
    assert "torch" in plan["versions"]
    for name in ("curves", "accuracy", "differences"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert len(runs_in(out)) == 5  # karat report and karat analyze take its folder


def test_what_was_measured_of_the_runs_is_in_the_table(study: Path) -> None:
    out = study / "out"
    rows = {row["name"]: row for row in json.loads((out / "study.json").read_text())["rows"]}
    for name, seeds in (("softmax", (0, 1)), ("operator", (0, 1)), ("wide", (0,))):
        kept = [read_measures(out / f"{name}-s{seed}") for seed in seeds]
        for number in ("largest_eigenvalue", "loss_rise", "map_faithfulness", "map_entropy"):
            values = [one[number] for one in kept if one is not None]
            assert rows[name]["measures"][number]["mean"] == pytest.approx(np.mean(values))
    assert rows["softmax"]["measures"]["map_negative_mass"]["mean"] == 0
    assert rows["operator"]["measures"]["map_negative_mass"]["mean"] > 0
    assert 0 < rows["softmax"]["measures"]["map_entropy"]["mean"] <= 1


def test_step_times_are_measured_apart_and_give_epochs_of_equal_time(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(study, "--time", "--rounds", "1")) == 0
    times = read_times(plan_in(study))
    assert set(times) == {"softmax", "operator", "wide"}
    assert all(set(kinds) == {"float32"} and kinds["float32"] > 0 for kinds in times.values())
    rows = json.loads((study / "out" / "study.json").read_text())["rows"]
    assert [row["step"]["float32"] for row in rows] == [times[row["name"]]["float32"] for row in rows]
    assert cli.main(arguments(study, "--time", "--rounds", "1", "wide")) == 0
    again = read_times(plan_in(study))
    assert again["softmax"] == times["softmax"]
    assert again["wide"] != times["wide"]
    capsys.readouterr()
    assert cli.main(arguments(study, "--only-table")) == 0
    plan = plan_in(study)
    seconds = {"softmax": {"float32": 1.0}, "operator": {"float32": 2.0}, "wide": {"float32": 0.5}}
    softmax, operator, wide = make_rows(plan, seconds, {})
    assert softmax.in_baseline_time == pytest.approx(softmax.top1.mean)  # type: ignore[union-attr]
    assert operator.in_baseline_time == pytest.approx(operator.curve[0])  # half of its two epochs
    assert wide.in_baseline_time == pytest.approx(wide.curve[-1])
    assert wide.time_ratio == pytest.approx(3 * 0.5 / (2 * 2.0))  # epochs x seconds, over those of the operator
    assert (softmax.time_ratio, operator.time_ratio) == (None, None)
    assert "| 0.38 × operator |" in markdown([softmax, operator, wide], "softmax")


def test_epochs_follow_from_step_times_until_a_run_has_begun(tmp_path: Path) -> None:
    found = {
        "settings": {"data": "digits", "epochs": 4},
        "variants": [
            {"attention": "softmax", "name": "longer", "equal_time_to": "operator", "batch_size": 64},
            {"attention": "g3b", "name": "operator"},
        ],
    }
    document = parse_document(found)
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    assert settle(plan, {}).variants[0].waits
    # twice the batch, half the steps: 4 epochs x 0.3 s a step are 8 of (0.3 / 2) s x 2
    settled = settle(plan, {"longer": {"float32": 0.3}, "operator": {"float32": 0.3}})
    assert settled.variants[0].settings.recipe.epochs == 8
    assert settled.variants[0].settings.recipe.batch_size == 2 * settled.variants[1].settings.recipe.batch_size
    # 4 epochs of 1.1 s are as long as 4.4 epochs of 1 s: five whole ones have no less time
    seconds = {"longer": {"float32": 2.0}, "operator": {"float32": 1.1}}
    assert settle(plan, seconds).variants[0].settings.recipe.epochs == 5
    run = tmp_path / "longer-s0"
    run.mkdir()
    runs.begin(run, settled.jobs()[0].settings, {"num_classes": 10, "in_chans": 3})
    again = make_plan(document, common_settings(document.settings), tmp_path)
    assert not again.variants[0].waits
    assert again.variants[0].settings.recipe.epochs == 8


def test_a_warm_up_keeps_its_share_of_the_epochs_that_step_times_give(tmp_path: Path) -> None:
    found = {
        "settings": {"data": "digits", "epochs": 4, "warmup_epochs": 1.2},
        "variants": [{"attention": "softmax", "name": "longer", "equal_time_to": "g3b"}, {"attention": "g3b"}],
    }
    document = parse_document(found)
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    longer, operator = settle(plan, {"longer": {"float32": 0.1}, "g3b": {"float32": 0.2}}).variants
    assert (longer.settings.recipe.epochs, longer.settings.recipe.warmup_epochs) == (8, 2.4)
    assert (operator.settings.recipe.epochs, operator.settings.recipe.warmup_epochs) == (4, 1.2)
    runs.begin(tmp_path / "longer-s0", longer.settings, {"num_classes": 10, "in_chans": 3})
    again = make_plan(document, common_settings(document.settings), tmp_path).variants[0]
    assert again.settings.recipe == longer.settings.recipe


def test_a_run_that_another_process_has_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_in(tmp_path).only(["wide"])
    (job,) = plan.jobs()
    with claimed(job.folder) as mine:
        assert mine
        with claimed(job.folder) as again:
            assert not again
        assert train_all(plan, console=Console(quiet=True), measure=False) == []
        assert not runs.is_run(job.folder)
    # nobody holds it now: the same call trains it, and a table of it alone says what is missing
    line = arguments(tmp_path, "--no-measure", "wide")
    assert cli.main(line) == 0
    assert summary_of(job) is not None
    assert "4 runs are not finished" in capsys.readouterr().out
    assert not (tmp_path / "out" / "study.json").exists()
    assert cli.main(arguments(tmp_path, "--only-table")) == 0
    assert "| softmax | 2 | 0 of 2 | – |" in (tmp_path / "out" / "study.md").read_text()


def test_a_half_finished_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from karat.train.classify import Classification
    from karat.train.engine import Trainer

    plan = plan_in(tmp_path).only(["wide"])
    (job,) = plan.jobs()
    trainer = Trainer(Classification(), job.settings)

    class Cut(Exception):
        pass

    def cut(*_: Any) -> None:
        if trainer.progress.epoch == 1:
            raise Cut

    trainer.after_step = cut  # type: ignore[method-assign]
    with pytest.raises(Cut):
        trainer.fit()
    assert summary_of(job) is None
    assert cli.main(arguments(tmp_path, "--no-measure", "wide")) == 0
    said = capsys.readouterr().out
    assert "epoch 1/3" not in said
    assert "epoch 2/3" in said
    assert summary_of(job) is not None


def test_a_diverged_run_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from karat.errors import TrainingDiverged
    from karat.study import work

    train, those = work._train, ["softmax-s0"]

    def diverge(job: Any, *rest: Any) -> None:
        if job.folder.name in those:
            raise TrainingDiverged("it diverged")
        train(job, *rest)

    monkeypatch.setattr(work, "_train", diverge)
    assert cli.main(arguments(tmp_path, "--no-measure", "--seeds", "1", "--epochs", "1")) == 1
    assert "softmax-s0" in capsys.readouterr().err
    assert "| operator | 1 | 1 |" in (tmp_path / "out" / "study.md").read_text()
    those += ["operator-s0", "wide-s0"]
    line = arguments(tmp_path, "--no-measure", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path / "all"))
    assert cli.main(line) == 1
    assert capsys.readouterr().err == "karat: training diverged: softmax-s0, operator-s0, wide-s0\n"


def test_a_row_that_waits_is_not_promised_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = arguments(tmp_path, "--no-measure", "--seeds", "1", "wide")
    waiting = STUDY + "[[variants]]\nname = 'as long'\nattention = 'softmax'\nequal_time_to = 'operator'\n"
    (tmp_path / "study.toml").write_text(waiting)
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    time = f"karat compare --study {tmp_path / 'study.toml'} --output {tmp_path / 'out'} --time"
    assert f"note: as long waits for step times: {time}" in said
    assert "3 runs are not finished, the first of them softmax-s0: the table is written when step times" in said
    assert "writes the table;" not in said


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    both = [Started(KARAT, *arguments(tmp_path, "--no-measure", "--seeds", "1")) for _ in range(2)]
    ends = [process.said() for process in both]
    assert [end.returncode for end in ends] == [0, 0]
    trained = [line.split(": ")[1] for end in ends for line in end.stdout.splitlines() if line.startswith("run ")]
    assert sorted(trained) == ["operator-s0", "softmax-s0", "wide-s0"]  # each once
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [len(row["seeds"]) for row in rows] == [1, 1, 1]
