"""Step times: what is timed, in which way, and for which settings times are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karat.study import timing
from karat.study.bench.step import step_of
from karat.study.bench.timing import Timing
from karat.study.document import parse_document
from karat.study.plan import Plan, common_settings, make_plan
from karat.study.timing import measure_times, read_times, step_settings, time_ratio

SMALL: dict[str, Any] = {
    **{"data": "digits", "recipe": "quick", "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2},
    **{"num_heads": 2, "batch_size": 4, "epochs": 4, "warmup_epochs": 1, "device": "cpu", "track": []},
}
ALTERED = {"grad_accum_steps": 3, "grad_checkpointing": True, "compile": True, "channels_last": True}


def plan_of(folder: Path, *rows: dict[str, Any]) -> Plan:
    document = parse_document({"settings": SMALL, "variants": list(rows)})
    return make_plan(document, common_settings(document.settings), folder)


def test_every_setting_of_a_step_is_tried() -> None:
    assert set(timing._OF_A_STEP) == {*ALTERED, "model", "attention", "teacher"}


def test_rows_that_take_other_steps_are_timed_apart(tmp_path: Path) -> None:
    rows = [{"attention": "softmax", "name": name, name: value} for name, value in ALTERED.items()]
    plan = plan_of(tmp_path, {"attention": "softmax"}, {"attention": "softmax", "name": "lr", "lr": 1.0}, *rows)
    keys = [repr(step_settings(variant.settings)) for variant in plan.variants]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 1 + len(ALTERED)


def test_a_step_is_taken_under_the_rows_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def catch(model: nn.Module, batch: int, **options: Any) -> Any:
        seen.update(options, model=model, batch=batch)
        return lambda: 0.0

    monkeypatch.setattr(timing, "step_of", catch)
    (variant,) = plan_of(tmp_path, {"attention": "softmax", **ALTERED}).variants
    timing._steps(variant.settings, 10, 3, "cpu", None)
    model = seen["model"]
    assert (seen["batch"], seen["batches"], seen["memory_format"]) == (4, 3, torch.channels_last)
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.grad_checkpointing
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("faster", ["fused softmax", "plain softmax"])
def test_softmax_is_timed_both_ways_and_the_faster_counts(
    faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, {"attention": "softmax"}, {"attention": "g1b"}, {"attention": "g1b,blocks=first"})
    taken: list[str] = []

    def alternate(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        taken.extend(steps)
        return {name: Timing.of([1.0 if name.endswith(faster) else 2.0]) for name in steps}

    monkeypatch.setattr(timing, "alternate", alternate)
    found = timing.measure_times(plan, rounds=1)
    assert [kinds["float32"] for kinds in found.values()] == [1.0, 2.0, 1.0]
    assert len(taken) == 2 + 1 + 2
    kept = json.loads((tmp_path / timing.TIMES).read_text())["rows"]
    assert [row["seconds"]["float32"]["way"] for row in kept.values()] == [faster, "own", faster]


def test_both_ways_of_softmax_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(True) or fused(*a, **k)
    )
    (variant,) = plan_of(tmp_path, {"attention": "softmax"}).variants
    steps = timing._steps(variant.settings, 10, 1, "cpu", None)
    counted = {}
    for way, step in steps.items():
        calls.clear()
        step()
        counted[way] = len(calls)
    assert counted == {"fused softmax": 2, "plain softmax": 0}  # of two blocks


def test_a_step_passes_over_every_batch_before_its_update() -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            before.append(self.weight.detach().clone())
            return super().forward(images.flatten(1))

    before: list[torch.Tensor] = []
    model = Counted(3 * 4 * 4, 10)
    step = step_of(model, 2, side=4, batches=3)
    step()
    assert model.calls == 3
    assert all(torch.equal(before[0], weight) for weight in before)
    assert not torch.equal(before[0], model.weight)


def test_a_step_of_several_batches_goes_through_the_data_faster(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"attention": "softmax"}, {"attention": "softmax", "name": "sum", "grad_accum_steps": 3})
    plain, summed = plan.variants
    seconds = {"softmax": {"float32": 1.0}, "sum": {"float32": 2.7}}
    assert time_ratio(summed, plain, seconds) == pytest.approx(0.9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Steps that take what "seconds" says, none of them done."""
    clock = {"seconds": 1.0}
    monkeypatch.setattr(timing, "_steps", lambda *_: {"own": lambda: 0.0})
    monkeypatch.setattr(timing, "alternate", lambda steps, _: {key: Timing.of([clock["seconds"]]) for key in steps})
    return clock


def test_times_are_of_the_settings_that_they_were_measured_under(tmp_path: Path, clock: dict[str, float]) -> None:
    measure_times(plan_of(tmp_path, {"attention": "softmax"}, {"attention": "g1b"}))
    same = plan_of(tmp_path, {"attention": "softmax", "lr": 1.0}, {"attention": "g3b"})
    assert read_times(same) == {"softmax": {"float32": 1.0}}
    other = plan_of(tmp_path, {"attention": "softmax", "batch_size": 8})
    with pytest.raises(ValueError, match="'softmax' was timed under other settings: batch_size was 4 and is now 8"):
        read_times(other)
    measure_times(other)
    assert read_times(other) == {"softmax": {"float32": 1.0}}


def test_times_of_some_rows_leave_the_others(tmp_path: Path, clock: dict[str, float]) -> None:
    rows = [{"attention": "softmax"}, {"attention": "g1b"}]
    measure_times(plan_of(tmp_path, *rows))
    clock["seconds"] = 2.0
    assert measure_times(plan_of(tmp_path, *rows), only=["g1b"]) == {"g1b": {"float32": 2.0}}
    assert read_times(plan_of(tmp_path, *rows)) == {"softmax": {"float32": 1.0}, "g1b": {"float32": 2.0}}


def test_times_of_other_machines_or_settings_are_not_put_together(
    tmp_path: Path, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"attention": "softmax"}, {"attention": "g1b"}]
    measure_times(plan_of(tmp_path, *rows))
    before = (tmp_path / timing.TIMES).read_text()
    with pytest.raises(ValueError, match="'softmax' was timed under other settings"):
        measure_times(plan_of(tmp_path, {"attention": "softmax", "drop": 0.5}, rows[1]), only=["g1b"])
    monkeypatch.setattr(timing, "environment", lambda: {"chip": "another"})
    with pytest.raises(ValueError, match=r"environment was .* time all variants"):
        measure_times(plan_of(tmp_path, *rows), only=["g1b"])
    assert (tmp_path / timing.TIMES).read_text() == before
