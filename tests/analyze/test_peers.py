"""Figure 1a: points from comparisons and runs, the published ones over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karat import cli, runs
from karat.analyze.figures import draw_parameters_accuracy
from karat.analyze.peers import measured_points, published_points
from karat.paper import rows
from karat.runs.classification import Settings


def comparison(folder: Path) -> Path:
    folder.mkdir()
    found = [
        {"attention": "softmax/grkan", "parameters": 683_866, "top1": 40.5},
        {"attention": "deep_kan(order=3)", "parameters": 91_520, "top1": 20.0},
    ]
    (folder / runs.COMPARISON).write_text(
        json.dumps({"settings": {"data": "../images/cifar10"}, "seeds": 1, "rows": found})
    )
    return folder


def run(folder: Path, finished: bool = True) -> Path:
    runs.begin(folder, Settings(model="vit_tiny_patch16_224", mlp="kan"), {"num_classes": 10, "in_chans": 3})
    if finished:
        (folder / runs.SUMMARY).write_text(json.dumps({"parameters": 2_000_000, "top1": 91.0}))
    return folder


def test_points_of_comparisons_and_runs(tmp_path: Path) -> None:
    found = measured_points([comparison(tmp_path / "both"), run(tmp_path / "one")])
    assert [(p.label, round(p.params_M, 3), p.top1, p.dataset) for p in found] == [
        ("softmax/grkan", 0.684, 40.5, "cifar10"),
        ("deep_kan(order=3)", 0.092, 20.0, "cifar10"),
        ("vit_tiny_patch16_224 softmax/kan", 2.0, 91.0, "digits"),
    ]


def test_a_studys_comparison_has_the_data_of_each_variants_runs(tmp_path: Path) -> None:
    row = {"attention": "small", "parameters": 1_000_000, "top1": 40.5, "runs": ["elsewhere/one"]}
    run(tmp_path / "study" / "one")
    (tmp_path / "study" / runs.COMPARISON).write_text(json.dumps({"rows": [row]}))
    assert [(p.label, p.dataset) for p in measured_points([tmp_path / "study"])] == [("small", "digits")]


def test_published_points_are_those_of_the_tables() -> None:
    by_label = {point.label: point for point in published_points()}
    assert [by_label[f"KAT-{size}"].top1 for size in "TSB"] == [74.6, 81.2, 82.3]
    assert [by_label[f"KAT-{size}"].params_M for size in "TSB"] == [5.7, 22.1, 86.6]
    assert by_label["Vision-KAN"].top1 == 64.87
    sizes = {"vit_tiny": "T", "vit_small": "S", "vit_base": "B"}
    for entry in rows(1):
        if entry.dataset == "imagenet1k" and entry.metric == "top1" and entry.model in sizes:
            variant = "" if entry.variant == "softmax" else f"+{entry.variant.upper()}"
            assert by_label[f"ViT-{sizes[entry.model]}{variant}"].top1 == entry.value


def test_the_figure_has_every_point_and_names_data_sets(tmp_path: Path) -> None:
    measured = measured_points([comparison(tmp_path / "both")])
    axes = draw_parameters_accuracy(measured, published_points()).axes[0]
    drawn = [tuple(place) for dots in axes.collections for place in dots.get_offsets().tolist()]
    assert sorted(drawn) == sorted((p.params_M, p.top1) for p in (*measured, *published_points()))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == "measured, cifar10"
    assert all("imagenet1k" in text for text in legend[1:])
    with pytest.raises(ValueError, match="no point"):
        draw_parameters_accuracy([], [])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison(tmp_path / "both")
    assert cli.main(["analyze", "peers", str(folder), "--formats", "svg"]) == 0
    assert (folder / "analysis" / "peers" / "parameters-accuracy.svg").stat().st_size > 1000
    numbers = json.loads((folder / "analysis" / "peers" / "numbers.json").read_text())
    assert len(numbers["measured"]) == 2
    assert cli.main(["analyze", "peers", str(run(tmp_path / "cut", finished=False))]) == 2
    assert "hasn't finished" in capsys.readouterr().err
    assert cli.main(["analyze", "peers", str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
