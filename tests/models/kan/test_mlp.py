"""KAN layers in a transformer, the peers by name, the deep classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import nn

import karat
from karat.models.kan import MLPS, PEERS, KANClassifier, SplineLinear, create_deep_kan, parse_mlp, replace_mlp

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize("mlp", [*MLPS, "kan(grid=3,ratio=2)", "grkan(groups=4,init=silu)", "grkan(form=code)"])
@pytest.mark.parametrize("attention", ["softmax", "g1b"])
def test_both_may_learn(mlp: str, attention: str) -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention=attention, mlp=mlp, **SMALL)
    assert not any(isinstance(module, Mlp) for module in model.modules())
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [*MLPS, "kat_tiny_patch16_224", "vit_kan_tiny_patch16_224", "deep_kan"])
def test_on_the_meta_device_and_as_features(name: str) -> None:
    """timm builds a twin without numbers to take a model's features."""
    build = {"model": "vit_tiny_patch16_224", "mlp": name} if name in MLPS else {"model": name}
    model = build.pop("model")
    with torch.device("meta"):
        made = karat.create_model(model, **build, **({} if name == "deep_kan" else SMALL))
    assert all(x.is_meta for x in made.state_dict().values())
    if name != "deep_kan":
        features = karat.create_model(model, **build, features_only=True, **SMALL | {"depth": 3})
        assert [x.shape[1] for x in features(torch.randn(1, 3, 32, 32))][-1] == 48


# PyTorch's own forward mode imports what its own compiler deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("mlp", MLPS)
def test_torch_func_sees_through_the_layers(mlp: str) -> None:
    """Gradients of each image by itself add up to the batch's, and a derivative along a direction is theirs."""
    model = karat.create_model("vit_tiny_patch16_224", attention="g1b,rank=2", mlp=mlp, **SMALL).double()
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x, directions = torch.randn(2, 3, 32, 32).double(), {name: torch.randn_like(x) for name, x in state.items()}

    def loss(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, state, (x,)).square().sum()

    total = dict(
        zip(state, torch.autograd.grad(loss(dict(model.named_parameters()), x), model.parameters()), strict=True)
    )
    apart = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x.unsqueeze(1))
    for name, wanted in total.items():
        torch.testing.assert_close(apart[name].sum(0), wanted)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, along = torch.func.jvp(lambda state: loss(state, x), (state,), (directions,))
    torch.testing.assert_close(along, sum((total[name] * directions[name]).sum() for name in total))


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


def published_kat(dim: int = 48, depth: int = 2, classes: int = 5) -> dict[str, torch.Tensor]:
    """Weights by the names and shapes of KAT's own model (github.com/Adamdad/kat) on 32² in patches of 8."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 17, dim), "patch_embed.proj.weight": (dim, 3, 8, 8),
        "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (classes, dim),
        "head.bias": (classes,),
    }  # fmt: skip
    for block in (f"blocks.{i}" for i in range(depth)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for name, (p, q) in {
            "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)
        }.items():  # fmt: skip
            shapes |= {f"{block}.{name}.weight": (p, q), f"{block}.{name}.bias": (p,)}
        for act in ("act1", "act2"):
            shapes |= {f"{block}.mlp.{act}.weight_numerator": (1, 6), f"{block}.mlp.{act}.weight_denominator": (8, 4)}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def kat_mlp(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A block's MLP as KAT's code computes it, x (T,C)."""

    def act(z: torch.Tensor, name: str) -> torch.Tensor:
        a, b = weights[f"{name}.weight_numerator"][0], weights[f"{name}.weight_denominator"].abs()
        b = b.repeat_interleave(z.shape[1] // 8, 0)
        return sum(a[i] * z**i for i in range(6)) / (1 + sum(b[:, j] * z.abs() ** (j + 1) for j in range(4)))

    hidden = torch.nn.functional.linear(act(x, "act1"), weights["fc1.weight"], weights["fc1.bias"])
    return torch.nn.functional.linear(act(hidden, "act2"), weights["fc2.weight"], weights["fc2.bias"])


@pytest.mark.parametrize("door", ["--init", "load_state_dict", "pretrained"])
def test_kats_published_weights_load_and_compute_what_its_code_does(door: str, tmp_path: Path) -> None:
    from karat.train.init import transplant

    weights = published_kat()
    if door == "pretrained":  # timm's own way: a configuration that names a file or the Hub's
        save_file(weights, tmp_path / "kat.safetensors")
        overlay = {"file": str(tmp_path / "kat.safetensors"), "num_classes": 5}
        name = "kat_tiny_patch16_224"
        model = karat.create_model(name, "softmax", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    else:
        model = karat.create_model("vit_tiny_patch16_224", "softmax", mlp="grkan(form=code)", **SMALL)
        if door == "--init":
            assert {fate.fate for fate in transplant(model, weights, "kat")} == {"loaded"}
        else:
            model.load_state_dict(weights)
    x = torch.randn(7, 48)
    mlp = model.get_submodule("blocks.1.mlp")
    expected = kat_mlp({name.removeprefix("blocks.1.mlp."): tensor for name, tensor in weights.items()}, x)
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mlp", ["mlp", "grkan", "grkan(share_denominator=False)"])
def test_kats_published_weights_are_refused_by_other_mlps(mlp: str) -> None:
    from karat.train.init import transplant

    model = karat.create_model("vit_tiny_patch16_224", "softmax", mlp=mlp, **SMALL)
    with pytest.raises(ValueError, match=r'--init kat: .*--mlp "grkan\(form=code\)"'):
        transplant(model, published_kat(), "kat")


@pytest.mark.parametrize(("form", "count"), [("paper", 5_718_664), ("code", 5_718_328)])
def test_kats_two_forms_have_their_numbers_of_parameters(form: str, count: int) -> None:
    model = karat.create_model("vit_tiny_patch16_224", "softmax", mlp=f"grkan(form={form})")
    assert sum(p.numel() for p in model.parameters()) == count


def test_forms_that_there_are_not_are_refused() -> None:
    for spec, words in (("grkan(form=x)", "paper, code"), ("grkan(form=code,share_denominator=False)", "form=paper")):
        with pytest.raises(ValueError, match=words):
            parse_mlp(spec)


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
