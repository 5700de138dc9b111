"""What was saved before operators had factors is opened as the same function, and resumed to the same weights.

tests/data/before says what was made and how; its factors are one, as if they had been saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import karat
from karat.cli import main
from karat.detect.measure import load_run as load_detector
from karat.runs.classification import Settings
from karat.runs.model import load_run
from karat.train.classify import Classification
from karat.train.engine import Trainer

BEFORE = Path(__file__).parent / "data" / "before"
MODEL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def expected(name: str) -> dict[str, Tensor]:
    """The images and what the version before made of them."""
    return load_file(BEFORE / "expected" / f"{name}.safetensors")


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal to the rounding of another processor: here the bits are the same."""
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=1e-5)


def without_factors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the version before had too; the factors beside them are one."""
    factors = {name: tensor for name, tensor in weights.items() if name.endswith("factor")}
    assert factors
    assert all((tensor == 1).all() for tensor in factors.values())
    return {name: tensor for name, tensor in weights.items() if name not in factors}


def check(model: nn.Module, name: str, answer: str = "logits") -> None:
    """A model with operators answers as the version before did."""
    saved = expected(name)
    without_factors(model.state_dict())
    with torch.no_grad():
        assert close(model(saved["images"]), saved[answer])


def check_resumed(command: list[str], name: str, folder: Path, files: set[str]) -> None:
    """A copy of an interrupted run goes on to its end, with the weights that the version before would have had."""
    shutil.copytree(BEFORE / name, folder)
    assert main([*command, "--resume", str(folder)]) == 0
    assert {file.stem for file in folder.glob("*.safetensors")} == files
    saved = expected(name)
    for file in files:
        found = without_factors(load_file(folder / f"{file}.safetensors"))
        assert found.keys() == {key.split("/")[2] for key in saved if key.startswith(f"resumed/{file}/")}
        wrong = [key for key, tensor in found.items() if not close(tensor, saved[f"resumed/{file}/{key}"])]
        assert not wrong


@pytest.mark.parametrize("weights", ["last", "ema"])
def test_a_run(weights: str) -> None:
    check(load_run(BEFORE / "run", weights), "run", f"logits/{weights}")


def test_a_run_goes_on(tmp_path: Path) -> None:
    check_resumed(["train"], "run", tmp_path / "run", {"model", "ema"})


def test_a_converted_run() -> None:
    check(load_run(BEFORE / "converted"), "converted")


def test_a_saved_model() -> None:
    check(karat.from_pretrained(BEFORE / "hub"), "hub")


def test_an_exported_model() -> None:
    saved = expected("model")
    logits = torch.export.load(BEFORE / "model.pt2").module()(saved["images"])
    assert close(logits, saved["logits"])
    assert close(logits, expected("hub")["logits"])


def test_a_state_dict() -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention="g3b", num_classes=10, in_chans=1, **MODEL)
    model.load_state_dict(load_file(BEFORE / "state.safetensors"))
    check(model.eval(), "state")


def test_a_run_that_starts_from_a_state_dict(tmp_path: Path) -> None:
    start = str(BEFORE / "state.safetensors")
    values = {"model": "vit_tiny_patch16_224", "attention": "g3b", "data": "digits", "data_fraction": 0.05, **MODEL}
    trainer = Trainer(
        Classification(), Settings.make(**values, init=start, output=tmp_path / "run", device="cpu", track=())
    )
    check(trainer.parts.bare.eval(), "state")


def test_a_run_of_detection() -> None:
    saved = expected("detect-run")
    detector, _, _ = load_detector(BEFORE / "detect-run")
    with torch.no_grad():
        assert close(detector.trunk(saved["images"]), saved["tokens"])
        (found,) = detector(list(saved["images"]))
    for name, values in found.items():
        wanted = saved[f"found/{name}"]
        assert torch.allclose(values[: len(wanted)].float(), wanted.float(), rtol=1e-5, atol=1e-5), name


def test_a_run_of_detection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BEFORE)  # its data is the folder coco
    check_resumed(["detect", "train"], "detect-run", tmp_path / "run", {"model"})
