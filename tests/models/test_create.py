"""Models by name: parameter totals of the paper, registration with timm, arguments."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import karat
from karat.models.backbones import attention_sites
from karat.models.create import REGISTERED, ModelArgumentsError, rebuild_model
from support.small_models import VIT


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# size, attention, classes, added parameters (SPEC §2), published total in millions (paper Table 1)
PUBLISHED = [
    ("tiny", "softmax", 10, 0, "5.53"),
    ("tiny", "g3b", 10, 765_936, "6.29"),
    ("tiny", "g3u", 10, 63_828, "5.59"),
    ("small", "softmax", 1000, 0, "22.05"),
    ("small", "g3b", 1000, 1_531_872, "23.58"),
    ("small", "g3u", 1000, 127_656, "22.18"),
    ("base", "softmax", 10, 0, "85.81"),
    ("base", "g1b", 10, 1_702_080, "87.51"),
    ("base", "g1u", 10, 141_840, "85.95"),
]


@pytest.mark.parametrize(("size", "attention", "classes", "added", "total"), PUBLISHED)
def test_parameters_as_published(size: str, attention: str, classes: int, added: int, total: str) -> None:
    spec = attention if attention == "softmax" else f"{attention},edge_scales=published"
    with torch.device("meta"):
        model = karat.create_model(f"vit_{size}_patch16_224", spec, num_classes=classes)
    assert sum(count(op) for op in karat.karat_operators(model).values()) == added
    assert f"{count(model) / 1e6:.2f}" == total


@pytest.mark.parametrize("base", REGISTERED)
def test_registered_names(base: str) -> None:
    assert f"karat_{base}" in timm.list_models("karat_*")
    with torch.device("meta"):
        model, plain = timm.create_model(f"karat_{base}", num_classes=7), timm.create_model(base)
    operators = karat.karat_operators(model)
    assert list(operators) == [f"{site.name}.operator" for site in attention_sites(plain) if site.kind.adapter]
    assert {str(op.config) for op in operators.values()} == {REGISTERED[base]}
    assert model.num_classes == 7


def test_a_registered_name_takes_another_attention() -> None:
    for create in (timm.create_model, karat.create_model):
        model = create("karat_vit_tiny_patch16_224", attention="dog-u", **VIT)
        assert str(model.karat_operator.config) == "dog-u"
        assert not karat.karat_operators(create("karat_vit_tiny_patch16_224", attention="softmax", **VIT))
    assert karat.karat_operators(karat.create_model("karat_vit_tiny_patch16_224", **VIT))


def test_softmax_is_the_default() -> None:
    assert not karat.karat_operators(karat.create_model("vit_tiny_patch16_224", **VIT))


def test_a_configuration_object_is_taken_as_well() -> None:
    config = karat.KArAtConfig(basis="fourier(grid=2)", rank=3)
    model = karat.create_model("vit_tiny_patch16_224", config, **VIT)
    assert model.blocks[0].attn.operator.config == config


def test_small_images_with_small_patches() -> None:
    model = karat.create_model(
        "vit_tiny_patch16_224", attention="g3b", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3
    )
    assert {op.num_tokens for op in karat.karat_operators(model).values()} == {65}
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="unknown model 'vit_tiny_patch16_223'; did you mean vit_tiny_patch16_224"):
        karat.create_model("vit_tiny_patch16_223")
    with pytest.raises(ValueError, match="can't read the attention"):
        karat.create_model("vit_tiny_patch16_224", "g3x")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 10, "num_heads": 3}),
        ("karat_vit_tiny_patch16_224", {"embed_dim": 10, "num_heads": 3}),
        ("vit_tiny_patch16_224.bogus", {}),
        ("deep_kan(foo=5)", {}),
        ("resnet18", {"img_size": 32}),
    ],
)
def test_what_timm_refuses_is_one_line(name: str, sizes: dict[str, int]) -> None:
    with pytest.raises(ModelArgumentsError, match="can't be built with") as caught:
        karat.create_model(name, **sizes)
    assert "\n" not in str(caught.value)


def test_a_failing_download_is_not_the_arguments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(RuntimeError, match="no network"):
        karat.create_model("vit_tiny_patch16_224", pretrained=True)


CUT = [
    ("vit_tiny_patch16_224", {"img_size": 31}, "15 pixels would be cut off; give 16 or 32"),
    ("vit_tiny_patch16_224", {"img_size": (32, 20)}, "img_size=20 is no multiple of the patch size 16"),
    ("vit_tiny_patch16_224", {"patch_size": 15}, "img_size=224 is no multiple of the patch size 15"),
    ("vit_tiny_patch16_224", {"img_size": 8}, "img_size=8 is smaller than a patch of 16 pixels"),
    ("mixer_s32_224", {"img_size": 100}, "no multiple"),
    ("mixer_s32_224", {"img_size": 8}, "smaller than a patch of 32 pixels"),
    ("swin_tiny_patch4_window7_224", {"img_size": 3}, "smaller than a patch of 4 pixels"),
    ("karat_vit_tiny_patch16_224", {"img_size": 31}, "no multiple"),
    ("convit_tiny", {"img_size": 30}, "no multiple"),
    ("swin_tiny_patch4_window7_224", {"img_size": 30}, "no multiple"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), CUT)
def test_images_that_patches_do_not_divide_are_refused(name, arguments, message):
    sizes = {} if name.startswith(("swin", "mixer")) else {"depth": 1}
    for create in (karat.create_model, karat.KArAtModel.create):
        with pytest.raises(ValueError, match=message):
            create(name, "softmax" if name.startswith(("convit", "mixer")) else "g3b", **sizes, **arguments)


def test_converting_refuses_images_smaller_than_a_patch():
    for name, side in (("vit_tiny_patch16_224", 8), ("swin_tiny_patch4_window7_224", 3)):
        with pytest.raises(ValueError, match=f"img_size={side} is smaller than a patch"):
            karat.karatize(timm.create_model(name, img_size=side), "g3b")


def test_padding_cuts_nothing_and_saved_models_are_built_as_they_were():
    sizes = {"img_size": 30, "depth": 1, "embed_dim": 24, "num_heads": 2}
    karat.create_model("vit_tiny_patch16_224", dynamic_img_pad=True, dynamic_img_size=True, **sizes)
    assert rebuild_model("vit_tiny_patch16_224", **sizes).patch_embed.grid_size == (1, 1)
    model = karat.create_model("vit_tiny_patch16_224", "g3b", **sizes | {"img_size": 32})
    with pytest.raises(ValueError, match="img_size=40 is no multiple of the patch size 16"):
        karat.resample_tokens(model, img_size=40)
