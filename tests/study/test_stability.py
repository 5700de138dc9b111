"""The learning-rate study: its order, runs that go on and diverge, what is collected, how criteria are judged."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from karat.errors import TrainingDiverged
from support.paths import ROOT


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("stability", monkeypatch)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("stability_results", monkeypatch)


def toy_job(stability: ModuleType, attention: str = "g1b,rank=2") -> Any:
    settings = {"data": "digits", "recipe": "quick", "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2}
    settings |= {"num_heads": 2, "data_fraction": 0.1, "batch_size": 16, "epochs": 1, "warmup_epochs": 0}
    task = stability.Task("toy", "classify", "top1", (1e-3,), 1, settings)
    return stability.Job(task, stability.Row("operator", attention), 1e-3, 0)


def results(
    qualities: dict[tuple[str, float], list[float]], criterion: str = "own best", **more: Any
) -> dict[str, Any]:
    runs = [
        {"task": "toy", "attention": name, "before": False, "peak": rate, "seed": seed, "quality": quality}
        | {"norms": [2.0, 1.0], "diverged": None}
        | more.get(name, {})
        for (name, rate), values in qualities.items()
        for seed, quality in enumerate(values)
    ]
    names = list(dict.fromkeys(name for name, _ in qualities))
    return {"tasks": {"toy": {"metric": "top1", "criterion": criterion}}, "attentions": names, "runs": runs}


def verdicts(text: str) -> dict[str, str]:
    """The last cell of each row of the last table, by its first cell."""
    table = text.rpartition("\n\n")[2].splitlines()[2:]
    return {cells[0]: cells[-1] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}


def test_the_studys_file_asks_for_what_the_issue_asks(stability: ModuleType) -> None:
    tasks, rows = stability.read_study(ROOT / "benchmarks" / "stability.toml")
    jobs = stability.make_jobs(tasks, rows)
    assert len({job.name for job in jobs}) == len(jobs)
    assert (jobs[0].row.name, jobs[0].task.name, jobs[0].seed) == ("softmax", "bccd-long", 0)
    for task in tasks:
        mine = [job for job in jobs if job.task == task]
        assert mine[0].row.name == "softmax"
        assert mine[0].rate == task.rates[(len(task.rates) - 1) // 2]
        outer = [job for job in mine if job.seed == 0 and job.rate in (task.rates[0], task.rates[-1])]
        inner = [job for job in mine if job.seed == 0 and job not in outer]
        assert not inner or mine.index(inner[-1]) < mine.index(outer[0])
    with pytest.raises(ValueError, match="no 'bcd'"):
        stability.choose(jobs, ["bcd"], [])


def test_runs_are_trained_once_and_refused_under_other_settings(
    stability: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, options = toy_job(stability), stability.Options(output=tmp_path)
    stability.work([job], options)
    stability.work([job], options)
    assert capsys.readouterr().out.count("toy--operator-lr0.001-s0") == 1
    assert not (tmp_path / job.name / "checkpoints").exists()
    found = json.loads(stability.as_text(stability.collect([job.task], [job], tmp_path, tmp_path)))
    assert [run["before"] for run in found["runs"]] == [False, True]
    (machine,) = found["machines"]
    assert machine["avx512"] in (True, False)
    run = found["runs"][0]
    assert run["quality"] == run["curve"][-1]
    assert run["norms"][0] > 0
    assert run["peak"] == pytest.approx(1e-3 * 16 / 512)
    job.task.settings["epochs"] = 2
    with pytest.raises(ValueError, match="epochs was 1 and is now 2"):
        stability.work([job], options)


def test_a_run_that_diverges_counts_as_nothing(
    stability: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, options = toy_job(stability), stability.Options(output=tmp_path)
    train = stability.train

    def diverge(*arguments: Any) -> None:
        train(*arguments)
        raise TrainingDiverged("nan")

    monkeypatch.setattr(stability, "train", diverge)
    stability.work([job], options)
    (run,) = stability.collect([job.task], [job], tmp_path, None)["runs"]
    assert run["quality"] == 0
    assert run["curve"][-1] > 0
    assert run["diverged"] == "nan"


def test_half_and_best_are_asked_for_and_twice_where_softmax_bears_it(shown: ModuleType) -> None:
    softmax = {("softmax", 1.0): [50.0, 50.0], ("softmax", 2.0): [60.0, 60.0], ("softmax", 4.0): [20.0, 20.0]}
    rows = {
        "good": ([57.0, 57.0], [60.0, 60.0], [1.0, 1.0]),
        "slow": ([40.0, 40.0], [60.0, 60.0], [60.0, 60.0]),
        "noisy": ([48.0, 58.0], [59.0, 61.0], [60.0, 60.0]),
        "once": ([57.0], [60.0], [60.0]),
        "dead": ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    }
    grid = {
        (name, rate): values for name, row in rows.items() for rate, values in zip((1.0, 2.0, 4.0), row, strict=True)
    }
    found = verdicts(shown.tables(results(softmax | grid)))
    assert found == {"softmax": "", "good": "yes", "slow": "no", "noisy": "within error", "once": "open", "dead": "no"}
    softmax["softmax", 4.0] = [58.0, 58.0]
    assert verdicts(shown.tables(results(softmax | grid)))["good"] == "no"
    assert verdicts(shown.tables(results(softmax | grid, good={"diverged": "nan"})))["good"] == "no"


def test_quality_and_gradient_norms_against_softmax(shown: ModuleType, tmp_path: Path) -> None:
    grid = {("softmax", 1.0): [50.0, 52.0], ("g1b", 1.0): [47.0, 46.0], ("wild", 1.0): [50.0, 52.0]}
    grid |= {("g1b beside softmax", 1.0): [47.0, 46.0], ("weak", 1.0): [30.0, 31.0]}
    found = results(grid, "softmax", wild={"norms": [2.0, 11.0]})
    assert verdicts(shown.tables(found)) == {"g1b": "yes", "g1b beside softmax": "no", "wild": "no", "weak": "no"}
    shown.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
