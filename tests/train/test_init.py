"""--init: what means the same is taken over, what only fits is not, and both are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import karat
from karat.operator.config import KArAtConfig
from karat.runs.classification import Settings
from karat.runs.model import build_model
from karat.train.init import DROPPED, FRESH, LOADED, RESIZED, Transplanted, account, load_init

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def saved(folder: Path, attention: str, mlp: str = "mlp", **sizes: Any) -> Path:
    model = karat.KArAtModel.create("vit_tiny_patch16_224", attention, mlp, num_classes=10, **SIZES | sizes)
    model.save_pretrained(folder)
    return folder


def started(init: Path, **values: Any) -> tuple[nn.Module, list[Transplanted]]:
    settings = Settings.make(model="vit_tiny_patch16_224", init=str(init), **SIZES | values)
    model = build_model(settings, 10, 3)
    return model, load_init(model, settings)


def fates(found: list[Transplanted], part: str) -> set[str]:
    return {entry.fate for entry in found if entry.part == part}


# Operators of equal names and shapes that mean something else.
ALIKE = [
    ("g3b", "bspline(grid=3,order=3)-b"),
    ("bspline(grid=4,order=2)-b", "bspline(grid=3,order=3)-b"),
    ("dog-b", "morlet-b"),
    ("g3b,rank=5", "g3b,rank=5,order=PhiW"),
    ("g3b,softmax_heads=(0,)", "g3b,softmax_heads=(1,)"),
    ("g3b,residual=softmax,gate=1", "g3b"),
    ("g3b,residual=softmax,gate=1", "g3b,residual=softmax,gate=2"),
    ("g3b,simplex=row", "g3b"),
    ("g3b", "g3b,base=silu"),
]


@pytest.mark.parametrize(("theirs", "mine"), [*ALIKE, *(pair[::-1] for pair in ALIKE)])
def test_operators_of_other_settings_start_fresh(theirs: str, mine: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", theirs)
    for init in (folder, folder / "model.safetensors"):
        _, found = started(init, attention=mine)
        assert fates(found, "operators") == {FRESH, DROPPED}
        assert {LOADED} == fates(found, "blocks: mlp")
        told, wanted = (KArAtConfig.parse(spec) for spec in (theirs, mine))
        assert f"operators: {init} has {told}, the model {wanted}" in account(found, str(init))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("form", ["folder", "file", "copy"])
def test_operators_of_the_same_settings_come_along(form: str, side: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", "g3b,softmax_heads=1")
    init = folder if form == "folder" else folder / "model.safetensors"
    if form == "copy":
        init = init.rename(tmp_path / "moved.safetensors")
    _, found = started(init, attention="g3b,softmax_heads=(1,),impl=tiled", img_size=side)
    fate = LOADED if side == 16 else RESIZED
    assert fates(found, "operators") == fates(found, "pos_embed") == {fate}
    assert fates(found, "head") == {LOADED}


@pytest.mark.parametrize("theirs", ["bspline(grid=3,order=3)-b", "g3b,order=PhiW,rank=5", "g3b"])
@pytest.mark.parametrize("side", [16, 32])
def test_of_a_file_that_says_nothing_factors_tell(theirs: str, side: int, tmp_path: Path) -> None:
    model = karat.create_model("vit_tiny_patch16_224", theirs, num_classes=10, **SIZES)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    mine = "g3b,rank=5" if "rank" in theirs else "g3b"
    _, found = started(tmp_path / "bare.safetensors", attention=mine, img_size=side)
    same = LOADED if side == 16 else RESIZED
    assert fates(found, "operators") == ({same} if theirs == mine else {FRESH, DROPPED})
    assert fates(found, "pos_embed") == {same}
    words = "operators: nothing in or beside" if theirs == mine else "has operators of another attention"
    assert words in account(found, "x")
    save_file(model.state_dict(), tmp_path / "told.safetensors", {"attention": theirs})
    _, found = started(tmp_path / "told.safetensors", attention=theirs, img_size=side)
    assert fates(found, "operators") == {same}
    assert "nothing" not in account(found, "x")


@pytest.mark.parametrize(
    ("theirs", "mine", "fate"),
    [
        ("kan(grid=3,range=2.0)", "kan(grid=3,range=4.0)", FRESH),
        ("kan(grid=3,base=silu)", "kan(grid=3,base=gelu)", FRESH),
        ("fourierkan(grid=4)", "fastkan(grid=8)", FRESH),
        ("grkan(init=silu)", "grkan", LOADED),
        ("mlp", "grkan", FRESH),
    ],
)
def test_kan_layers_of_other_settings_start_fresh(theirs: str, mine: str, fate: str, tmp_path: Path) -> None:
    model, found = started(saved(tmp_path / "saved", "softmax", theirs), mlp=mine)
    assert fate in fates(found, "blocks: mlp")
    weights = karat.from_pretrained(tmp_path / "saved").backbone.state_dict()
    own = model.state_dict()
    for name in [name for name in own if "coefficients" in name or "numerator" in name]:
        same = name in weights and torch.equal(own[name], weights[name])
        assert same == (fate == LOADED)


def test_heads_that_are_cut_differently_are_other_heads(tmp_path: Path) -> None:
    _, found = started(saved(tmp_path / "saved", "softmax"), num_heads=3)
    assert fates(found, "blocks: attn") == {FRESH, DROPPED}
    assert "has 2 heads, the model 3" in account(found, "x")
