"""KAN layers in a transformer, the peers by name, the deep classifier."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

import karat
from karat.models.kan import MLPS, PEERS, KANClassifier, SplineLinear, create_deep_kan, parse_mlp, replace_mlp

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize("mlp", [*MLPS, "kan(grid=3,ratio=2)", "grkan(groups=4,init=silu)"])
@pytest.mark.parametrize("attention", ["softmax", "g1b"])
def test_both_may_learn(mlp: str, attention: str) -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention=attention, mlp=mlp, **SMALL)
    assert not any(isinstance(module, Mlp) for module in model.modules())
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convit_tiny"])
def test_other_backbones(name: str) -> None:
    model = timm.create_model(name, depths=(1, 1, 1, 1)) if "swin" in name else timm.create_model(name)
    before = sum(isinstance(module, Mlp) for module in model.modules())
    replace_mlp(model, "fastkan")
    assert before > 0
    assert not any(isinstance(module, Mlp) for module in model.modules())


def test_grkan_takes_over_a_vit() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for p in vit.parameters():  # as spread as trained weights are
        nn.init.normal_(p, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    kat = replace_mlp(timm.create_model("vit_tiny_patch16_224", **SMALL).eval(), "grkan")
    missing, unexpected = kat.load_state_dict(vit.state_dict(), strict=False)
    assert not unexpected
    assert all(".act1." in name or ".act2." in name for name in missing)
    torch.testing.assert_close(kat(images), expected, atol=0.02, rtol=0.02)
    replace_mlp(vit, "grkan", take_over=True)
    torch.testing.assert_close(vit(images), kat(images))


def test_a_run_of_kat_starts_from_a_softmax_vit() -> None:
    """`--init VIT --mlp grkan`, as KAT starts: all of the ViT's weights, and its function within the fit."""
    from karat.train.init import transplant

    vit = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    kat = karat.create_model("vit_tiny_patch16_224", "softmax", mlp="grkan", **SMALL).eval()
    fates = transplant(kat, vit.state_dict(), "a ViT")
    assert sum(fate.tensors for fate in fates if fate.fate == "fresh") == 4 * len(kat.blocks)  # type: ignore[arg-type]
    assert not any(fate.fate == "dropped" for fate in fates)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(kat(images), vit(images), atol=0.02, rtol=0.02)


def test_taking_over_needs_the_same_width() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ValueError, match="ratio"):
        replace_mlp(model, "grkan(ratio=2)", take_over=True)


def test_grkan_coefficients_are_spared_from_decay() -> None:
    from timm.optim import param_groups_weight_decay

    model = karat.create_model("vit_tiny_patch16_224", mlp="grkan", **SMALL)
    spared, _ = param_groups_weight_decay(model, 0.05)
    identities = {id(p) for p in spared["params"]}
    assert id(model.blocks[0].mlp.act1.numerator) in identities  # type: ignore[union-attr]
    assert id(model.blocks[0].mlp.act2.denominator) in identities  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("kat_tiny_patch16_224", 5.7),
        ("kat_small_patch16_224", 22.1),
        ("kat_base_patch16_224", 86.6),
        ("vit_kan_tiny_patch16_224", 12.8),
        ("deit_kan_tiny_patch16_224", 12.8),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        peer = PEERS[name]
        backbone = timm.create_model(peer.backbone, num_classes=1000)
    kind = parse_mlp(peer.mlp)
    assert kind is not None
    mlp, width = backbone.blocks[0].mlp, backbone.embed_dim
    new = kind.build(kind.sizes(width, 4 * width, width), (0.0, 0.0))
    count = sum(p.numel() for p in backbone.parameters())
    count += len(backbone.blocks) * sum(p.numel() * sign for m, sign in ((new, 1), (mlp, -1)) for p in m.parameters())
    assert round(count / 1e6, 1) == millions


def test_peers_are_timm_models_with_any_attention() -> None:
    kat = karat.create_model("kat_tiny_patch16_224", attention="g1u", **SMALL)
    assert kat.blocks[0].mlp.act2.init == "silu"  # type: ignore[union-attr]
    assert len(karat.karat_operators(kat)) == 1
    plain = timm.create_model("deit_kan_tiny_patch16_224", **SMALL)
    assert isinstance(plain.blocks[1].mlp.fc1, SplineLinear)


def test_deep_kan_by_name() -> None:
    named = karat.create_model("deep_kan(order=5,range=(-6,6),layers=(20,40))", "softmax", num_classes=7, img_size=8)
    assert isinstance(named, KANClassifier)
    assert [layer.out_features for layer in named.layers] == [20, 40, 7]
    assert named.layers[0].knots[0, 5] == -6
    images = torch.randn(4, 3, 8, 8)
    named.set_grad_checkpointing()
    named(images).sum().backward()
    assert all(p.grad is not None for p in named.parameters())
    with pytest.raises(ValueError, match="192 values"):
        named(torch.randn(2, 3, 9, 9))
    with pytest.raises(ValueError, match="range"):
        KANClassifier(4, range=(-1.0, 2.0))


def test_deep_kan_of_images_that_are_not_square() -> None:
    assert create_deep_kan(img_size=(8, 16))(torch.randn(2, 3, 8, 16)).shape == (2, 10)
    for size in ((8, 8, 8), (8, 0), 0, -8):
        with pytest.raises(ValueError, match="img_size"):
            create_deep_kan(img_size=size)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("kanx", "kanx"),
        ("kan(colour=3)", "colour"),
        ("kan(grid=", "can't read"),
        ("kan(5)", "can't read"),
        ("kan(ratio=0)", "ratio"),
    ],
)
def test_unreadable_specs_are_refused(spec: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_mlp(spec)


def test_specs_read_back() -> None:
    for spec in ("grkan", "kan(grid=5,base=zero)", "fastkan(ratio=2)"):
        kind = parse_mlp(spec)
        assert parse_mlp(str(kind)) == kind
    assert parse_mlp("mlp") is None


def test_a_model_without_mlps_is_refused() -> None:
    with pytest.raises(ValueError, match="no MLP"):
        replace_mlp(nn.Linear(2, 2), "kan")
