"""benchmarks/score_tasks.py: answers of its three tasks against loops over pairs, and what right functions explain."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType

import pytest
import torch

from support.paths import ROOT


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "score_tasks", raising=False)
    import score_tasks

    return score_tasks


def by_hand(task: str, cosines: list[float], signs: list[float]) -> float:
    """The answer for a query from its similarities to all keys."""
    same = [c > 0.99 for c in cosines]
    if task == "count":
        return float(sum(same))
    if task == "band":
        return sum(sign for c, sign in zip(cosines, signs, strict=True) if 0 < c < 0.5)
    (odd,) = [sign for one, sign in zip(same, signs, strict=True) if not one]
    crowd = sum(sign for one, sign in zip(same, signs, strict=True) if one)
    return odd - crowd / math.sqrt(len(signs) - 1)


@pytest.mark.parametrize("task", ["count", "odd one out", "band"])
def test_answers_by_hand(tasks: ModuleType, task: str) -> None:
    B, N = 6, 9
    scenes = tasks.TASKS[task](B, N, torch.Generator().manual_seed(1))
    cosines = scenes.directions @ scenes.directions.mT
    assert torch.allclose(scenes.directions.norm(dim=-1), torch.ones(B, N))
    assert set(scenes.signs.unique().tolist()) == {-1.0, 1.0}
    for scene in range(B):
        for query in range(N):
            if scenes.asked[scene, query]:
                expected = by_hand(task, cosines[scene, query].tolist(), scenes.signs[scene].tolist())
                assert scenes.answers[scene, query] == pytest.approx(expected, abs=1e-5)
    assert int((~scenes.asked).sum()) == (B if task == "odd one out" else 0)


@pytest.mark.parametrize("task", ["count", "odd one out", "band"])
def test_the_right_weights_give_the_answers(tasks: ModuleType, task: str) -> None:
    N = 9
    scenes = tasks.TASKS[task](6, N, torch.Generator().manual_seed(2))
    cosines = (scenes.directions @ scenes.directions.mT).clamp(max=1)
    values = torch.ones_like(scenes.signs) if task == "count" else scenes.signs
    weights = tasks.right_weights(task, torch.where(cosines > 1 - 1e-5, 1.0, cosines), N)
    answers = (weights @ values[..., None])[..., 0]
    assert torch.allclose(answers[scenes.asked], scenes.answers[scenes.asked], atol=1e-5)


def test_the_page_has_the_table_of_the_results(tasks: ModuleType) -> None:
    import score_tasks_shown as shown

    results = json.loads((ROOT / "docs" / "results" / "science" / "score_tasks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    assert f"<!-- table: score-tasks -->\n{shown.tables(results)}\n<!-- end of table -->" in page
    for row in results["rows"]:
        assert [run["seed"] for run in shown.runs_of(results, row, "band", tasks.BASE)] == list(tasks.SEEDS)


def test_every_attention_trains(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "STEPS", 2)
    monkeypatch.setattr(tasks, "MEASURED", 50)
    for name in ("softmax", "φ(score), G3", "operator G3, rank 4"):
        found = tasks.train(tasks.Job("count", name, tasks.BASE, 1e-3, 0))
        assert found["explained"] < 1
        assert len(found["weights"]) == len(tasks.LINE)
