"""Runs with a fixed function in softmax's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from karat import from_pretrained
from karat.cli import main
from karat.operator.fixed import FIXED
from karat.runs.model import load_run
from karat.share.hub.runs import from_run
from support.training import TINY, options


@pytest.mark.parametrize("name", FIXED)
def test_a_run_is_trained_resumed_measured_and_saved(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *options(run, attention=name, epochs=1)]) == 0
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    model = load_run(run)
    x = torch.randn(2, 1, TINY["img_size"], TINY["img_size"])
    saved = from_run(run)
    assert saved.config.attention == name
    saved.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "learnable" not in card.partition("##")[0]
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path / "saved")(x), model(x))


def test_neither_a_run_of_one_nor_one_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *options(run, attention="relu", epochs=1)]) == 0
    capsys.readouterr()
    assert main(["convert", str(run), "--attention", "g1b,rank=2", "--output", str(tmp_path / "made")]) == 2
    assert "has no softmax attention (relu)" in capsys.readouterr().err
    assert main(["convert", str(run), "--attention", "relu", "--output", str(tmp_path / "made")]) == 2
    assert "residual" not in capsys.readouterr().err  # it takes none


def test_they_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: value for name, value in TINY.items() if name != "epochs"}
    line = options(tmp_path / "out", **few, epochs=1)
    assert main(["compare", "softmax", "sigmoid", "lsa,blocks=(0,)", *line]) == 0
    assert "sigmoid" in capsys.readouterr().out
