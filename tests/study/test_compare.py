"""Contenders of a comparison: attentions, MLPs and models by name, with what each of them costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from karat import cli, runs
from karat.errors import TrainingDiverged
from karat.models.flops import multiply_adds
from karat.runs.classification import SMALL_MODEL, Settings
from karat.study.compare import contender, count_operations
from karat.train.engine import Trainer

SMALL = Settings(model="vit_tiny_patch16_224", **SMALL_MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "model", "attention", "mlp"),
    [
        ("g3b", "vit_tiny_patch16_224", "g3b", "mlp"),
        ("softmax/kan(grid=5)", "vit_tiny_patch16_224", "softmax", "kan(grid=5)"),
        ("g1u,rank=4/grkan", "vit_tiny_patch16_224", "g1u,rank=4", "grkan"),
        ("kat_tiny_patch16_224", "kat_tiny_patch16_224", "softmax", "mlp"),
        ("deit_kan_tiny_patch16_224/g3b", "deit_kan_tiny_patch16_224", "g3b", "mlp"),
        ("convit_tiny/g3b/fastkan", "convit_tiny", "g3b", "fastkan"),
        ("deep_kan(order=5,layers=(20,40))", "deep_kan(order=5,layers=(20,40))", "softmax", "mlp"),
    ],
)
def test_names_are_read(name: str, model: str, attention: str, mlp: str) -> None:
    chosen = contender(name, SMALL)
    assert (chosen.model, chosen.attention, chosen.mlp) == (model, attention, mlp)
    assert chosen.img_size == 32
    assert chosen.depth == (None if name.startswith("deep_kan") else 6)


@pytest.mark.parametrize(
    ("name", "named"),
    [("softmax/kam", "kam"), ("a/b/c", "a"), ("deep_kan(order=", "can't read"), ("softmax/kan/g3b", "ATTENTION")],
)
def test_unreadable_names_are_refused(name: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        contender(name, SMALL)


def test_a_studys_file_in_place_of_an_attention_says_where_it_goes() -> None:
    with pytest.raises(ValueError, match="a study's file goes behind --study"):
        contender("studies/digits.toml", SMALL)


def test_operations_of_a_deep_kan_are_its_products() -> None:
    chosen = contender("deep_kan(order=3,grid=10,layers=(10,20))", Settings(img_size=8))
    # every edge: G + k splines and the base activation
    assert count_operations(chosen, 10, 1) == (13 + 1) * (64 * 10 + 10 * 20 + 20 * 10)


def test_each_mlp_is_counted() -> None:
    plain = count_operations(contender("softmax", SMALL), 10, 3)
    dim, tokens = 96, 65
    saved = 2 * dim * 4 * dim  # the two products of the MLP, a token
    for mlp, per_token in (
        ("kan", 12 * 2 * dim * dim),  # G + k = 11 splines and the base
        ("fourierkan", 6 * 2 * dim * dim),
        ("fastkan", 9 * 2 * dim * dim),
        # powers x^0..x^5 times two polynomials, before each product
        ("grkan", saved + 12 * (dim + 4 * dim)),
    ):
        found = count_operations(contender(f"softmax/{mlp}", SMALL), 10, 3)
        assert found - plain == 6 * tokens * (per_token - saved), mlp


def test_peers_and_deep_kans_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["softmax/grkan", "kat_tiny_patch16_224/g1u", "deep_kan(order=1,grid=3)"]
    line = ["--data", "digits", "--epochs", "1", "--data-fraction", "0.1", "--output", str(tmp_path / "out")]
    assert cli.main(["compare", *names, *line]) == 0
    said = capsys.readouterr().out
    for column in ("top-1 %", "params", "mult-", "ms /", "memory"):
        assert column in said
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["attention"] for row in found] == names
    for row in found:
        settings, _ = runs.read_config(Path(row["runs"][0]))
        assert row["multiply_adds"] == count_operations(settings, 10, 1) > 0
        assert row["ms_per_step"] == pytest.approx(runs.read_history(Path(row["runs"][0]))[-1]["ms_per_step"])
        assert row["ms_per_step"] > 0
        assert row["peak_memory_mib"] > 0


def test_a_run_that_diverges_does_not_take_the_others_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def diverge(trainer: Trainer) -> dict[str, Any]:
        if trainer.settings.attention == "g1b":
            raise TrainingDiverged("it diverged")
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", diverge)
    line = ["--data", "digits", "--epochs", "1", "--data-fraction", "0.1", "--output", str(tmp_path / "out")]
    assert cli.main(["compare", "g1b", "softmax", *line]) == 1
    said = capsys.readouterr()
    assert said.err == "karat: training diverged: g1b-s0\n"
    assert "note: g1b-s0 diverged: it diverged" in said.out
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["attention"] == "softmax"
    assert (tmp_path / "out" / "curves.png").is_file()
    assert cli.main(["compare", "g1b", *line[:-1], str(tmp_path / "all")]) == 1
    assert not (tmp_path / "all" / "compare.json").exists()


def test_different_input_sizes_and_doubles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "kat_tiny_patch16_224", "deep_kan", "--model", "vit_tiny_patch16_224"]) == 2
    assert "--img-size" in capsys.readouterr().err
    assert cli.main(["compare", "g3b/grkan", "softmax", "g3b/grkan"]) == 2
    assert "twice" in capsys.readouterr().err


def test_a_contender_that_cannot_be_built_is_refused_before_any_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sizes = ["--depth", "1", "--embed-dim", "24", "--num-heads", "2", "--epochs", "1"]
    line = ["compare", "softmax", "g3b,softmax_heads=2", "--data", "digits", *sizes, "--output", str(out)]
    assert cli.main(line) == 2
    assert "variant 'g3b,softmax_heads=2': " in capsys.readouterr().err
    assert not out.exists()


def test_counting_leaves_the_random_states_alone() -> None:
    import torch

    before = torch.get_rng_state()
    count_operations(contender("deep_kan", Settings(img_size=8)), 10, 1)
    assert torch.equal(torch.get_rng_state(), before)
    model = torch.nn.Linear(3, 2).train()
    assert multiply_adds(model, torch.zeros(1, 3)) == 6
    assert model.training


def test_the_data_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (60 * number, 0, 90)).save(tmp_path / "data" / name / f"{number}.png")
    sizes = "--img-size 16 --patch-size 8 --embed-dim 24 --depth 1 --num-heads 2 --batch-size 4 --epochs 1 --workers 0"
    folders = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert cli.main(["compare", "softmax", "g3b", "--device", "cpu", *folders, *sizes.split()]) == 0
    assert capsys.readouterr().out.count("8 images in 2 classes") == 1
