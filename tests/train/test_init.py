"""--init: what means the same is taken over, what only fits is not, and both are said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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


def timms(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **metadata: str) -> dict[str, Tensor]:
    """Write timm's weights, changed; returns them as they were."""
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZES).state_dict()
    save_file({name: x.clone() for name, x in change(weights).items()}, path, metadata=metadata or None)
    return weights


NAMED = {  # other names for weights -> how they come about
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "model.": lambda name: f"model.{name}",
    "deeper": lambda name: f"ema.model.{name}",
    "each block compiled": lambda name: re.sub(r"^(blocks\.\d+)", r"\1._orig_mod", name),
}


@pytest.mark.parametrize("named", NAMED)
def test_names_below_others_are_the_models(named: str, tmp_path: Path) -> None:
    weights = timms(tmp_path / "x.safetensors", lambda own: {NAMED[named](name): x for name, x in own.items()})
    model, found = started(tmp_path / "x.safetensors")
    assert {entry.fate for entry in found} == {LOADED}
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_an_average_beside_the_weights_is_dropped(tmp_path: Path) -> None:
    weights = timms(tmp_path / "x.safetensors", lambda own: own | {f"module.{name}": x + 1 for name, x in own.items()})
    model, found = started(tmp_path / "x.safetensors")
    assert fates(found, "module") == {DROPPED}
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_names_of_another_model_are_refused_with_the_models(tmp_path: Path) -> None:
    timms(tmp_path / "x.safetensors", lambda own: {f"a.{name}": x for name, x in own.items()} | {"b": own["cls_token"]})
    with pytest.raises(ValueError, match=r"shares no weight .*'a\..*, the model 'cls_token'\): give its tensors"):
        started(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool])
def test_quantised_weights_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    timms(tmp_path / "x.safetensors", lambda own: own | {name: own[name].to(kind)})
    with pytest.raises(ValueError, match=rf"--init .*'{name}' is {str(kind)[6:]}, quantised"):
        started(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    timms(tmp_path / "x.safetensors", lambda own: own | {"norm.bias": own["norm.bias"] + value})
    with pytest.raises(ValueError, match=r"--init .*'norm\.bias' has numbers that aren't finite"):
        started(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(kind: torch.dtype, tmp_path: Path) -> None:
    weights = timms(tmp_path / "x.safetensors", lambda own: {name: x.to(kind) for name, x in own.items()})
    model, _ = started(tmp_path / "x.safetensors")
    assert all(torch.equal(x, weights[name].to(kind).float()) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "noted",
    [{"attention": "flash"}, {"mlp": "moe"}, {"class_names": "cat"}, {"class_names": "3"}, {"class_names": "{}"}],
)
def test_metadata_that_is_not_karats_is_named(noted: dict[str, str], tmp_path: Path) -> None:
    timms(tmp_path / "x.safetensors", lambda own: own, **{"attention": "softmax"} | noted)
    with pytest.raises(ValueError, match=r"--init .*x\.safetensors has metadata that can't be karat's"):
        started(tmp_path / "x.safetensors")
