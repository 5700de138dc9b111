"""`karat convert`: from a softmax run, or a timm model's weights, to an ordinary run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import karat
from karat import cli, runs
from karat.analyze.loading import open_run
from karat.paper.measured import read_run
from karat.runs import files
from karat.runs.model import load_run
from karat.train.classify import train
from karat.train.convert import Convert, _teacher
from support.training import tiny


def convert(*words: object) -> int:
    return cli.main(["convert", *map(str, words), "--device", "cpu", "--batch-size", "32"])


def test_a_run_is_converted_and_used(softmax_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    line = (softmax_run, "--attention", "g2b,rank=6", "--images", 96, "--output", made)
    assert convert(*line, "--distill-epochs", 2, "--distill-images", 64) == 0
    said = capsys.readouterr().out
    assert "blocks.1.attn" in said
    report = json.loads((made / "convert.json").read_text())
    teacher = json.loads((softmax_run / "summary.json").read_text())
    assert report["before"]["top1"] == teacher["top1"]
    assert len(report["distill_errors"]) == 2
    for block in report["blocks"]:
        assert block["explained"] > 0.5
    # an ordinary run: it's evaluated, opened, fine-tuned from; its weights are vouched for
    assert cli.main(["eval", str(made)]) == 0
    assert json.loads((made / "eval.json").read_text())["top1"] == report["after"]["top1"]
    assert open_run(made).model().blocks[0].attn.operator.num_tokens == 17
    assert cli.main(["report", str(made), "--sections", "curves", "cost"]) == 0
    assert (made / "report.html").stat().st_size > 1000
    settings, facts = runs.read_config(made)
    assert settings.attention == "g2b,rank=6"
    assert facts["converted_from"] == str(softmax_run)
    train(tiny(tmp_path / "tuned", **SIZE, attention="g2b,rank=6", init=str(made), epochs=1))
    fates = json.loads((tmp_path / "tuned" / "config.json").read_text())["init"]
    assert {fate["fate"] for fate in fates} == {"loaded"}
    # nothing there is overwritten unasked, nor by going on with it
    capsys.readouterr()
    assert convert(*line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(made)]) == 2
    assert "--init" in capsys.readouterr().err
    assert cli.main(["eval", str(made), "--weights", "best"]) == 2
    assert "was converted, not trained" in capsys.readouterr().err
    assert convert(softmax_run, "--output", softmax_run, "--overwrite") == 2
    assert "is what this run starts from" in capsys.readouterr().err
    train(tiny(made, **SIZE, epochs=1, overwrite=True))  # a new run there leaves nothing of the conversion
    assert not (made / "convert.json").exists()


def test_other_data_is_taken_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(run, epochs=1, data_dir=str(tmp_path / "elsewhere")))
    options = Convert(str(run), attention="g1b", data="torch/mnist")
    settings, _, _ = _teacher(options)
    assert (settings.data, settings.data_fraction, settings.data_dir) == ("torch/mnist", 1.0, None)
    assert _teacher(replace(options, data="digits"))[0].data_fraction == 0.1


def test_a_converted_run_is_refused(softmax_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert convert(softmax_run, "--attention", "g1b,rank=2", "--images", 32, "--output", made) == 0
    capsys.readouterr()
    with pytest.raises(ValueError, match="was converted, not trained"):
        read_run(made)
    assert convert(made, "--output", tmp_path / "again") == 2
    assert "learnable attention already" in capsys.readouterr().err


def test_softmax_with_a_learned_bias_is_no_plain_softmax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    train(tiny(run, attention="softmax,position_bias=relative", epochs=1))
    assert convert(run, "--output", made) == 2
    assert "learnable attention already (softmax,position_bias=relative)" in capsys.readouterr().err
    assert cli.main(["analyze", "parts", str(run), "--images", "2", "--output", str(made)]) == 2
    assert "this model has no learnable attention" in capsys.readouterr().err


SIZE = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_residual_starts_as_its_teacher(softmax_run: Path, tmp_path: Path) -> None:
    assert convert(softmax_run, "--attention", "g1b,residual=softmax", "--output", tmp_path / "made") == 0
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(load_run(tmp_path / "made")(x), load_run(softmax_run)(x))


def test_another_size_on_the_way(softmax_run: Path, tmp_path: Path) -> None:
    assert convert(softmax_run, "--attention", "g1b", "--img-size", 12, "--output", tmp_path / "made") == 0
    assert load_run(tmp_path / "made").blocks[0].attn.operator.num_tokens == 37


def test_a_timm_model_with_weights_of_its_own(tmp_path: Path) -> None:
    model = karat.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=32)
    wrapped = {f"module.{name}": x for name, x in model.state_dict().items()}  # by DDP
    files.write_tensors(tmp_path / "weights.safetensors", wrapped)
    words = ["vit_tiny_patch16_224", "--data", "digits", "--img-size", 32, "--images", 32, "--eval-images", 40]
    words += ["--checkpoint", tmp_path / "weights.safetensors", "--attention", "g1b,rank=2"]
    assert convert(*words, "--output", tmp_path / "made", "--no-refit-projection", "--no-fold") == 0
    converted, weights = load_run(tmp_path / "made"), model.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in converted.state_dict().items() if "operator" not in n)
    assert json.loads((tmp_path / "made" / "convert.json").read_text())["after"]["images"] == 40


def test_operators_come_along_to_another_size(tmp_path: Path) -> None:
    """karat train --init RUN --img-size: position embeddings and operators are those of the run, resampled."""
    train(tiny(tmp_path / "small", attention="g2b,rank=3", epochs=1))
    from karat.runs.model import build_model
    from karat.train.init import load_init

    settings = tiny(tmp_path / "large", attention="g2b,rank=3", img_size=16, epochs=1, init=str(tmp_path / "small"))
    model = build_model(settings, 10, 1)
    fates = load_init(model, settings)
    expected = karat.resample_tokens(load_run(tmp_path / "small"), img_size=16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {f.fate for f in fates if f.part == "operators"} == {"resized"}
    assert {f.fate for f in fates if f.part == "pos_embed"} == {"resized"}
    assert {f.fate for f in fates if f.part == "head"} == {"loaded"}
    train(settings)
