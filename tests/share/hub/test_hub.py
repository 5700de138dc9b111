"""Saved models: what comes back is what was saved, to the bit, and what is damaged is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import karat
from karat.ops.triton import attention as triton
from karat.runs import files
from karat.share.hub import KArAtModel, ModelConfig, storage
from support.processes import python
from support.small_models import BACKBONES, SMALL, images

NAMES = ("zero", "one", "two", "three")
VARIANTS = [
    ("vit", "g3b", None),
    ("vit", "g2u,residual=softmax", None),
    ("vit_registers", "dog-b,softmax_heads=1", None),
    ("vit_norms", "softmax", None),
    ("vit", "g1b", "grkan(groups=4)"),
    ("vit", "softmax", "kan(grid=3)"),
    ("convit", "bspline(grid=4)-u", None),
    ("swin", "g3b,base=silu", None),
    ("vit_registers", "softmax,position_bias=relative,blocks=first", None),
    ("vit", "static-u,residual=softmax,gate=0.5", None),
    ("vit", "g2b,rank=None,order=Pointwise,position_bias=relative", None),
    ("convit", "g2b,position=query", None),
    ("vit", "recommended", None),
]


def saved_model(name: str = "vit", attention: str = "g3b", mlp: str | None = None, **kwargs: Any) -> KArAtModel:
    timm_name, arguments, _, _ = SMALL[name]
    return KArAtModel.create(timm_name, attention, mlp, class_names=NAMES, **{**arguments, **kwargs}).eval()


@pytest.mark.parametrize(("name", "attention", "mlp"), VARIANTS)
def test_a_saved_model_comes_back_to_the_bit(name: str, attention: str, mlp: str | None, tmp_path: Path) -> None:
    model = saved_model(name, attention, mlp)
    model.save_pretrained(tmp_path / "saved")
    before = torch.get_rng_state()
    again = karat.from_pretrained(tmp_path / "saved")
    assert torch.equal(before, torch.get_rng_state())
    assert again.config == model.config
    assert again.config.class_names == NAMES
    assert not again.training
    x = images(name)
    assert torch.equal(again(x), model(x))
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_fresh_process_needs_the_folder_alone(tmp_path: Path) -> None:
    model = saved_model("vit", "g3u", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model.save_pretrained(tmp_path / "saved")
    x = images("vit")
    save_file({"x": x, "logits": model(x).detach()}, tmp_path / "expected.safetensors")
    code = """
import sys, torch, karat
from safetensors.torch import load_file
model = karat.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
assert torch.equal(model(expected["x"]), expected["logits"])
assert model.config.mean == (0.1, 0.2, 0.3) and model.config.img_size == 16
"""
    done = python(code, str(tmp_path / "saved"), str(tmp_path / "expected.safetensors"))
    assert done.returncode == 0, done.stderr


def test_the_shared_operator_is_saved_once_and_names_are_the_backbones(tmp_path: Path) -> None:
    model = saved_model("vit", "g3u")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == set(model.backbone.state_dict())
    assert [name for name in weights if "coefficients" in name] == ["karat_operator.layers.0.coefficients"]
    again = karat.from_pretrained(tmp_path).backbone
    assert again.blocks[0].attn.operator is again.blocks[1].attn.operator


@pytest.mark.parametrize("name", BACKBONES)
def test_a_resampled_model_is_saved_at_its_new_size(name: str, tmp_path: Path) -> None:
    model = saved_model(name)
    side = 2 * model.config.sides[0]
    karat.resample_tokens(model.backbone, img_size=side)
    model.save_pretrained(tmp_path)
    again = KArAtModel.from_pretrained(tmp_path)
    assert again.config.img_size == side
    x = torch.randn(2, 3, side, side)
    assert torch.equal(again(x), model(x))


def test_a_swin_whose_window_alone_was_changed(tmp_path: Path) -> None:
    model = saved_model("swin")
    window = model.backbone.layers[0].blocks[0].window_size[0]
    karat.resample_tokens(model.backbone, window_size=window // 2)
    model.save_pretrained(tmp_path)
    again = KArAtModel.from_pretrained(tmp_path)
    assert again.config.sides == model.config.sides
    assert again.backbone.layers[0].blocks[0].window_size == (window // 2, window // 2)
    x = images("swin")
    assert torch.equal(again(x), model(x))


def test_precision_and_implementation(tmp_path: Path) -> None:
    model = saved_model("vit", "g3b,impl=tiled").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = karat.from_pretrained(tmp_path)
    assert again.config.attention == "g3b"  # which kernel ran it here is no part of the model
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = saved_model("vit", "g3b").to(torch.bfloat16)
    model.backbone.head.float()
    with pytest.raises(ValueError, match=r"mixes precisions \(torch.bfloat16, torch.float32\).*\.float\(\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_layers_share_come_back(tmp_path: Path) -> None:
    """The file has each name's numbers once more: safetensors refuses two names of one memory."""
    name, arguments, _, _ = SMALL["vit"]
    model = KArAtModel.create(name, "g1b", num_classes=4, **arguments).eval()
    first, second = (block.mlp.fc1 for block in model.backbone.blocks)
    second.weight = first.weight
    model.save_pretrained(tmp_path)
    x = images("vit")
    assert torch.equal(karat.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("image", [torch.zeros(3, 16, 16), 5])
def test_what_is_no_picture_is_refused(image: Any) -> None:
    name, arguments, _, _ = SMALL["vit"]
    model = KArAtModel.create(name, "g1b", num_classes=4, **arguments)
    with pytest.raises(ValueError, match=f"a file or a PIL picture, got {type(image).__name__}: call the model"):
        model.predict([image])


def test_a_backbone_that_the_config_does_not_describe_is_not_saved(tmp_path: Path) -> None:
    model = saved_model("vit", "g3b")
    karat.resample_tokens(model.backbone, num_prefix_tokens=0)
    with pytest.raises(ValueError, match=r"could not be loaded again: 'cls_token' is missing"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not describe this model"):
        KArAtModel(model.config, model.backbone)
    assert not (tmp_path / "config.json").exists()


def test_a_backbone_of_the_same_weights_that_computes_something_else_is_not_taken() -> None:
    model = saved_model("vit", "g3b")
    for block in model.backbone.blocks:
        block.mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"with the same weights its logits are .* of their size away"):
        KArAtModel(model.config, model.backbone)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_backbone_is_taken_wherever_it_lies_and_whatever_ran_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unsupported", lambda *_: "here it can't run")
    model = saved_model("vit", "g3b")
    backbone = karat.create_model(SMALL["vit"][0], "g3b,impl=triton", num_classes=4, **SMALL["vit"][1]).to(device)
    assert KArAtModel(model.config, backbone).backbone.blocks[0].attn.operator.config.impl == "triton"


def test_a_model_of_several_outputs_comes_back(tmp_path: Path) -> None:
    model = saved_model("vit", "g3b", features_only=True, out_indices=(0, 1))
    model.save_pretrained(tmp_path)
    x = images("vit")
    assert all(map(torch.equal, karat.from_pretrained(tmp_path)(x), model(x)))


def test_what_is_saved_stays_until_another_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = saved_model("vit", "g3b"), saved_model("vit", "g3b")
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    x = images("vit")
    for module, name in ((files, "write_tensors"), (files, "write_json"), (ModelCard, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space"):
                other.save_pretrained(tmp_path)
        assert torch.equal(karat.from_pretrained(tmp_path)(x), model(x))
    before = {path.name for path in tmp_path.iterdir()}
    assert before == {"config.json", "model.safetensors", "README.md"}
    other.save_pretrained(tmp_path)
    assert torch.equal(karat.from_pretrained(tmp_path)(x), other(x))
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("text", ['{"settings": {}}', '{"model_type": "vit"}', "{"])
def test_a_folder_with_anothers_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"no saved model's, a run's say: give another folder"):
        saved_model("vit", "g3b").save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    table = json.loads(path.read_text())
    for name, value in changes.items():
        table.pop(name, None)
        if value is not None:
            table[name] = value
    path.write_text(json.dumps(table))


CONFIG_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown entry": ({"depth_of_thought": 3}, "'depth_of_thought', which this version of karat does not know"),
    "missing entry": ({"attention": None}, "has no 'attention'"),
    "another format": ({"format": 2}, "format 2: it is no saved model of this version"),
    "no format": ({"format": None}, "has no format"),
    "unknown attention": ({"attention": "g3"}, "can't read the attention 'g3'"),
    "unknown model": ({"model": "vit_tinny_patch16_224"}, "unknown model 'vit_tinny_patch16_224'"),
    "unknown mlp": ({"mlp": "nope"}, "unknown mlp 'nope'"),
    "wrong type": ({"num_classes": "four"}, "num_classes='four': give a whole number"),
    "class names": ({"class_names": ["a"]}, "1 class_names for 4 classes"),
    "unknown argument": ({"model_args": {"widht": 3}}, "widht"),
    "deviation": ({"std": [1.0, 1.0, 0.0]}, "give a positive value"),
    "another attention": ({"attention": "g2b"}, r"is (3, 6, 17, 12) there, (3, 4, 17, 12) in the model"),
    "more blocks": ({"model_args": {**SMALL["vit"][1], "depth": 3}}, "'blocks.2."),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "whole"
    saved_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_damaged_config_is_refused_by_name(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    changes, words = CONFIG_DAMAGE[damage]
    _edit(folder, **changes)
    with pytest.raises(ValueError) as refusal:
        karat.from_pretrained(folder)
    assert words in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_damaged_files_are_refused(whole: Path, tmp_path: Path) -> None:
    def refused(change: Any, words: str) -> None:
        folder = shutil.copytree(whole, tmp_path / "copy")
        change(folder)
        with pytest.raises(ValueError, match=words):
            karat.from_pretrained(folder)
        shutil.rmtree(folder)

    def flip(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    refused(flip, "model.safetensors is refused: its SHA-256")
    refused(lambda f: os.truncate(f / "model.safetensors", 1000), "not a whole safetensors file")
    refused(lambda f: (f / "model.safetensors").unlink(), "model.safetensors is not there")
    refused(lambda f: (f / "config.json").unlink(), "has no config.json")
    refused(lambda f: os.truncate(f / "config.json", 100), "not valid JSON")
    refused(lambda f: (f / "config.json").write_text("[1]"), "no table of settings but list")
    refused(lambda f: _edit(f, weights_sha256=None), "says no SHA-256")
    with pytest.raises(ValueError, match="is no folder"):
        karat.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="could not be had from the Hub"):
        karat.from_pretrained("nobody/nothing", local_files_only=True)


def test_config_writes_and_reads_itself() -> None:
    config = ModelConfig(
        "swin_tiny_patch4_window7_224", "dog-b", num_classes=2, img_size=(32, 64), model_args={"depths": (2, 2)}
    )
    again = ModelConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again.arguments() == config.arguments()
    assert again.sides == (32, 64)
    with pytest.raises(ValueError, match="interpolation='guess': one of"):
        ModelConfig("vit_tiny_patch16_224", interpolation="guess")


def test_push_uploads_the_saved_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Repo:
        repo_id = "me/model"

    def upload(self: Any, **kwargs: Any) -> str:
        seen["files"] = sorted(path.name for path in Path(kwargs["folder_path"]).iterdir())
        seen["card"] = (Path(kwargs["folder_path"]) / storage.CARD).read_text()
        seen["model"] = karat.from_pretrained(kwargs["folder_path"])
        return "url"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, **kwargs: Repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    model = saved_model()
    assert model.push_to_hub("me/model") == "url"
    assert seen["files"] == sorted([storage.CARD, storage.CONFIG, storage.WEIGHTS])
    x = images("vit")
    assert torch.equal(seen["model"](x), model(x))
    assert 'from_pretrained("me/model")' in seen["card"]


def test_pretrained_weights_are_not_asked_for_again() -> None:
    model = KArAtModel.create("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2, pretrained=False)
    assert "pretrained" not in model.config.model_args
