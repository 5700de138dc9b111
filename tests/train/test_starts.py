"""Runs whose attention starts in a way of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from karat import runs
from karat.cli import main
from karat.models.starts import STARTS
from karat.runs.classification import Settings
from karat.runs.model import build_model, load_run
from karat.share.hub.runs import from_run, train_command
from karat.train.classify import train
from support.starts import check_published
from support.training import options, tiny

MODEL = "vit_tiny_patch16_224"
POOLS = {"class token": "pos_embed=sincos", "average": "pos_embed=sincos,global_pool=avg,class_token=false"}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_so_and_is_read_again(name: str, tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", attention="static-b,rank=2,residual=softmax", attn_init=name, epochs=1)
    torch.manual_seed(3)
    fresh = build_model(settings, 10, 1)
    torch.manual_seed(3)
    usual = build_model(tiny(tmp_path / "other", attention=settings.attention), 10, 1)
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, usual.blocks[0].attn.qkv.weight)
    train(settings)
    assert runs.read_config(tmp_path / "run")[0] == settings
    assert f"--attn-init {name}" in train_command(settings)
    model = load_run(tmp_path / "run").state_dict()
    saved = from_run(tmp_path / "run")
    assert all(torch.equal(value, model[key]) for key, value in saved.backbone.state_dict().items())
    assert "attn_init" not in saved.config.model_args


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", STARTS)
def test_the_command_line_starts_as_published(name: str, pool: str, tmp_path: Path) -> None:
    """The weights that the run itself kept from before its first update."""
    size = {"img_size": 16, "embed_dim": 64, "data_fraction": 0.02, "epochs": 1, "warmup_epochs": 0}
    line = options(tmp_path / "run", model=f"{MODEL}({POOLS[pool]})", checkpoints="trajectory", **size)
    assert main(["train", *line, "--attn-init", name, "--attention", "static-b,rank=2,residual=softmax"]) == 0
    settings, facts = runs.read_config(tmp_path / "run")
    usual = replace(settings, attention="softmax")  # the same names but for the operators'
    model = build_model(usual, facts["num_classes"], facts["in_chans"], tmp_path / "run")
    start = load_file(tmp_path / "run" / "trajectory" / "epoch-0000.safetensors")
    model.load_state_dict({key: value for key, value in start.items() if "operator" not in key})
    check_published(name, model)


def test_a_start_in_the_models_name_is_the_option() -> None:
    """One record of it, which labels, folders, students and what is refused follow."""
    named = Settings.make(model=f"{MODEL}(pos_embed=sincos, attn_init=mimetic)", attention="g3b")
    assert named == Settings.make(model=f"{MODEL}(pos_embed=sincos)", attention="g3b", attn_init="mimetic")
    assert Settings.make(model=f"{MODEL}(attn_init=mimetic)", attn_init="mimetic").model == MODEL
    for other, message in (
        ({"attn_init": "impulse"}, "attn_init=mimetic in the model's name and attn_init=impulse beside it differ"),
        ({"init": "hub:x"}, "attn_init=mimetic is undone by what --init"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.make(model=f"{MODEL}(attn_init=mimetic)", **other)
    with pytest.raises(ValueError, match="attn_init"):
        Settings.make(model=f"{MODEL}(attn_init=mimetics)")


def test_settings_that_the_name_has_otherwise_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options(tmp_path / "run", model=f"{MODEL}(depth=3)")]) == 2
    error = capsys.readouterr().err
    assert "depth=3 in the model's name and depth=2 beside it differ: give one of them" in error
    assert error.count("\n") == 1


def test_labels_and_folders_name_the_start() -> None:
    settings = Settings.make(attention="g3b", attn_init="mimetic")
    assert settings.label == "g3b/mimetic"
    assert "g3b-mimetic-s0" in settings.folder_name()
    assert Settings.make(attention="g3b", mlp="kan").label == "g3b/kan"


@pytest.mark.parametrize("other", [{"init": "hub:x"}, {"attention": "softmax", "teacher": "RUN"}])
def test_a_start_beside_weights_that_undo_it_is_refused(other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="attn_init=matched is undone by what --init or a teacher brings"):
        Settings.make(attn_init="matched", **other)
    with pytest.raises(ValueError, match="attn_init"):
        Settings.make(attn_init="none")
