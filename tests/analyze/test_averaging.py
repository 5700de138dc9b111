"""Models whose attention is averaged over images, where the outcome is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.analyze.ablation import ablate
from karat.analyze.averaging import averaged
from karat.cli import main
from support.small_models import images, small_model


def outspoken(name: str, attention: str = "softmax") -> tuple[nn.Module, Tensor, Tensor]:
    """A model that sees the image, and 150 images: two batches, the second smaller."""
    torch.manual_seed(0)
    model = small_model(name, attention)
    for key, weight in model.named_parameters():
        if key.endswith(("qkv.weight", "qk.weight")):
            nn.init.normal_(weight, std=0.3)
    return model, images(name, 150), torch.randint(0, 4, (150,))


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(pixels), labels))


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "convit"])
def test_of_one_image_many_times_the_mean_is_its_own(name: str) -> None:
    model, pixels, labels = outspoken(name)
    same = pixels[:1].expand(150, -1, -1, -1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = averaged(model.train(), same, labels)
    assert model.training
    expected = loss_of(model, same, labels)  # nothing was left behind
    assert found.loss == pytest.approx(expected, abs=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert averaged(model, pixels, labels).loss != pytest.approx(loss_of(model, pixels, labels), abs=1e-4)


def test_a_vits_mean_by_hand() -> None:
    model, pixels, labels = outspoken("vit")
    seen: dict[int, Tensor] = {}

    def mixed(index: int, attn: nn.Module, x: Tensor, sigma: Tensor | None) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if sigma is None:
            sigma = (q @ k.mT * attn.scale).softmax(-1)
            seen[index] = sigma.mean(0)
        return attn.proj((sigma @ v).transpose(1, 2).flatten(2))

    def logits(maps: dict[int, Tensor]) -> Tensor:
        x = model.pos_drop(model._pos_embed(model.patch_embed(pixels)))
        for index, block in enumerate(model.blocks):
            x = x + mixed(index, block.attn, block.norm1(x), maps.get(index))
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))

    with torch.no_grad():
        logits({})
        expected = float(F.cross_entropy(logits(seen), labels))
    assert averaged(model, pixels, labels).loss == pytest.approx(expected, abs=1e-5)


def test_static_mixing_in_softmaxs_place_loses_nothing_and_an_operator_loses_what_follows_the_image() -> None:
    model, pixels, labels = outspoken("vit", "static-b,rank=3")
    assert averaged(model, pixels, labels).loss == pytest.approx(loss_of(model, pixels, labels), abs=1e-5)
    model, pixels, labels = outspoken("vit", "g2b")
    common = ablate(model, pixels, labels)["what all images have in common"]
    assert averaged(model, pixels, labels).loss == pytest.approx(common.loss, abs=1e-5)


@pytest.mark.parametrize(("name", "attention"), [("swin", "softmax"), ("swin", "g2b"), ("vit", "diff")])
def test_models_without_such_a_mean(name: str, attention: str) -> None:
    arguments = {"num_heads": 2, "embed_dim": 24} if attention == "diff" else {}
    with pytest.raises(ValueError, match="can't be replaced by its mean over images"):
        averaged(small_model(name, attention, **arguments), images(name), torch.zeros(2, dtype=torch.long))


def test_the_curve_has_every_fourth_epoch_and_the_last(karat_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(karat_run, tmp_path / "run")
    for epoch in range(3, 7):
        shutil.copy(
            run / "trajectory" / "epoch-0002.safetensors", run / "trajectory" / f"epoch-{epoch:04d}.safetensors"
        )
    assert main(f"analyze averaging {run} --samples 16 --split eval".split()) == 0
    found = json.loads((run / "analysis" / "averaging" / "numbers.json").read_text())["g2b,rank=3"]
    assert (found["images"], found["split"]) == (16, "eval")
    assert [line["epoch"] for line in found["epochs"]] == [0, 4, 6]
    assert found["epochs"][1] == found["epochs"][2] | {"epoch": 4}
    assert all(line["lost"] == line["top1"] - line["averaged"] for line in found["epochs"])
