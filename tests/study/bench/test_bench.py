"""Benchmarks at toy sizes: what they compare is the same mathematics, and what they keep can be read."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from karat import KArAtOperator
from karat.study.bench import attention, memory, paper_way, step, throughput
from karat.study.bench.commands import bench
from karat.study.bench.timing import Timing, against_softmax, alternate
from support.paths import ROOT

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.mark.parametrize("rank", [4, None])
def test_the_papers_way_is_the_operator(rank: int | None) -> None:
    op = KArAtOperator(3, 9, f"g3b,rank={rank}")
    q, k, v = torch.randn(3, 2, 3, 9, 8).unbind()
    torch.testing.assert_close(paper_way.attend(op, q, k, v), op.attend(q, k, v), rtol=1e-4, atol=1e-5)


def test_the_papers_way_refuses_what_it_does_not_have() -> None:
    q = torch.randn(1, 3, 9, 8)
    with pytest.raises(ValueError, match="order WPhi alone"):
        paper_way.attend(KArAtOperator(3, 9, "g1b,order=PhiW"), q, q, q)
    for option in (
        "simplex=row",
        "simplex=rank",
        "residual=softmax",
        "softmax_heads=1",
        "position=query",
    ):
        with pytest.raises(ValueError, match=f"can't do {option.split('=')[0]}"):
            paper_way.attend(KArAtOperator(3, 9, f"g1b,{option}"), q, q, q)
    for name, value in (("mask", torch.ones(9, 9, dtype=torch.bool)), ("bias", torch.zeros(9, 9)), ("dropout_p", 0.1)):
        with pytest.raises(ValueError, match=f"can't do {name}"):
            paper_way.attend(KArAtOperator(3, 9, "g1b"), q, q, q, **{name: value})
    shape = attention.AttentionShape(1, 3, 9, 8)
    assert "paper's way" not in attention.ways(shape, "g1b,simplex=row", "cpu", torch.float32)


def test_every_way_is_called_in_turn() -> None:
    calls: list[str] = []
    timings = alternate({"softmax": lambda: calls.append("a"), "ours": lambda: calls.append("b")}, 2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert all(0 <= timing.least <= timing.median <= timing.most for timing in timings.values())


def test_ratios_are_against_the_faster_softmax() -> None:
    timings = {name: Timing(t, t, t) for name, t in (("softmax eager", 2.0), ("softmax SDPA", 4.0), ("karat", 3.0))}
    assert against_softmax(timings) == {"softmax eager": 1.0, "softmax SDPA": 2.0, "karat": 1.5}


def test_ways_of_attention_named_by_implementation() -> None:
    ways = attention.ways(attention.AttentionShape(1, 2, 9, 8), "g1b", "cpu", torch.float32)
    assert {"softmax eager", "softmax SDPA", "paper's way", "karat tiled"} <= set(ways)
    assert set(attention.ways(attention.AttentionShape(1, 2, 9, 8), "static-b", "cpu", torch.float32)) == {
        "softmax eager",
        "softmax SDPA",
        "karat",
    }


COMMANDS = {
    "op": "op --attention g1b --heads 2 --batch 1 --tokens 9 --head-dim 8",
    "scaling-R": "scaling --tokens --grids --ranks 2 4 --batch 1 --heads 1",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_table_json_and_figure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench([*COMMANDS[name].split(), "--rounds", "1", "--output", str(tmp_path)])
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"chip", "threads", "torch"} <= set(kept["environment"])
    assert {row["way"] for row in kept["rows"]} >= {"softmax SDPA", "karat tiled"}
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert kept["title"][:20] in capsys.readouterr().out


@pytest.mark.parametrize("command", ["op --attention --heads", "step --models", "scaling --tokens --grids --ranks"])
def test_nothing_to_measure_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        bench(command.split())


@pytest.mark.parametrize("signal", [9, 11])
def test_a_process_that_was_killed_is_said_to_be(signal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -signal, "", "a warning\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(RuntimeError, match=f"vit failed: signal {signal} ended it, which is 9 where memory ran out"):
        memory.measure("vit", "g1b", "karat")


def test_steps_and_throughput_of_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_tiny_patch16_224"
    timings = step.measure(name, "g1b", batch=2, rounds=1, materialised=True, model_options=SMALL)
    assert set(timings) == {"softmax eager", "softmax SDPA", "paper's way", "karat"}
    losses = {way: step.step_of(step.build(name, way, "g1b", **SMALL), 2)() for way in ("karat", "paper's way")}
    assert losses["karat"] == pytest.approx(losses["paper's way"], rel=1e-4)
    monkeypatch.setattr(throughput, "build", lambda name, way, attention: step.build(name, way, attention, **SMALL))
    assert set(throughput.measure(name, "g1b", batch=2, rounds=1)) == {*step.SOFTMAX_WAYS, "karat"}


def test_the_papers_way_has_no_residual() -> None:
    for command in ("memory --models tiny-residual", "step --models tiny-residual --paper"):
        with pytest.raises(ValueError, match="which has no residual; leave it out"):
            bench(command.split())


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peak = memory.measure("vit_tiny_patch16_224", "g1b", "karat", batch=2, steps=1, model_options=SMALL)
    assert 0 <= peak.model <= peak.step < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--output", str(tmp_path / "gpu")])
    assert importlib.import_module("gpu").main() == 1
    assert "No CUDA GPU is here, so nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_the_gpu_script_goes_on_where_it_was_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    script, whole = gpu.Gpu(dry=True, output=tmp_path), [gpu.check("error", 1.0, 2.0)]
    assert script.done() == {}
    script.write({"tests": whole, "memory": [gpu.check("memory", None, None) | {"failed": True}]})
    assert script.done() == {"tests": whole}
    assert gpu.Gpu(dry=True, rounds=3, output=tmp_path).done() == {}  # other figures
