"""Runs whose attention starts in a way of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from karat import runs
from karat.models.starts import STARTS
from karat.runs.classification import Settings
from karat.runs.model import build_model, load_run
from karat.share.hub.runs import from_run, train_command
from karat.train.classify import train
from support.training import tiny


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
