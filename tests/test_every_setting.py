"""No setting of the operator is taken and ignored: wherever it can be given it changes something, or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import karat
from karat import KArAtConfig, KArAtOperator
from karat.detect.trunk import create_trunk
from karat.share.hub.model import KArAtModel
from karat.study.bench import paper_way
from support.small_models import VIT

# A value of each setting that isn't the default, and what it stands beside.
VALUES: dict[str, dict[str, Any]] = {
    "basis": {"basis": "dog"},
    "rank": {"rank": 3},
    "order": {"order": "PhiW"},
    "sharing": {"sharing": "universal"},
    "base": {"base": "silu"},
    "edge_scales": {"edge_scales": True},
    "simplex": {"simplex": "row"},
    "softmax_heads": {"softmax_heads": 1},
    "blocks": {"blocks": (1,)},
    "residual": {"residual": "softmax"},
    "gate": {"gate": 0.5, "residual": "softmax"},
    "position": {"position": "query"},
    "position_bias": {"position_bias": "relative", "softmax_heads": 1},
    "init": {"init": "paper"},
    "init_scale": {"init_scale": 0.5},
    "impl": {"impl": "tiled"},
}
SETTINGS = [field.name for field in dataclasses.fields(KArAtConfig)]
TELLS = [name for name in VALUES if name != "impl"]  # which changes no number
ALONE = [name for name, given in VALUES.items() if not {"residual", "softmax_heads", "simplex"} & given.keys()]
FAMILIES = ("fourier(grid=3)", "static", "softmax", "sigmoid", "lsa", "diff")


def of_timm(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return karat.create_model("vit_tiny_patch16_224", config, num_classes=4, **VIT), (torch.ones(1, 3, 16, 16),)


def of_layers(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = karat.attn_layer(config, num_tokens=17)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, num_classes=4, **VIT)
    return model, (torch.ones(1, 3, 16, 16),)


def of_sequences(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return karat.SequenceAttention(24, 3, 9, config), (torch.randn(1, 9, 24),)


def across(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return karat.CrossAttention(24, 3, 9, config), (torch.randn(1, 9, 24), torch.randn(1, 9, 24))


def of_anybody(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer, x = nn.TransformerEncoderLayer(24, 3, 24, batch_first=True), torch.randn(1, 9, 24)
    return karat.karatize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), config, example=x), (x,)


def of_transformers(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    transformers = pytest.importorskip("transformers", reason="an optional extra: pip install 'karat[transformers]'")
    from karat.share.transformers import karatize_hf

    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=24))
    return karatize_hf(model, config), (torch.ones(1, 3, 16, 16),)


def of_detectors(config: KArAtConfig) -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes: dict[str, Any] = {**VIT, "window": 4, "whole": (1,)}
    return create_trunk("vit_tiny_patch16_224", config, **sizes), (torch.ones(1, 3, 16, 16),)


Use = Callable[[KArAtConfig], tuple[nn.Module, tuple[Tensor, ...]]]
OTHERS = (of_layers, of_sequences, across, of_anybody, of_transformers, of_detectors)
PLACES = [(of_timm, family) for family in FAMILIES] + [(use, FAMILIES[0]) for use in OTHERS]


@cache
def outcome(use: Use, config: KArAtConfig) -> tuple[list[str], Tensor] | None:
    """The names of all numbers, and what comes out; None where the configuration is refused."""
    torch.manual_seed(0)
    try:
        model, inputs = use(config)
    except ValueError:
        return None
    out = model.eval()(*inputs)
    return list(model.state_dict()), (out if isinstance(out, Tensor) else out.logits).detach()


def test_every_setting_is_tried() -> None:
    assert list(VALUES) == SETTINGS, "VALUES wants a value for each setting of KArAtConfig that isn't its default"


@pytest.mark.parametrize("name", VALUES)
def test_what_a_name_says_is_read_back(name: str) -> None:
    config = KArAtConfig(**VALUES[name])
    assert getattr(config, name) != KArAtConfig.__dataclass_fields__[name].default
    assert KArAtConfig.parse(str(config)) == config


@pytest.mark.parametrize("name", TELLS)
@pytest.mark.parametrize(("use", "family"), PLACES, ids=lambda x: getattr(x, "__name__", x))
def test_what_is_taken_changes_something(use: Use, family: str, name: str) -> None:
    beside = {key: value for key, value in VALUES[name].items() if key != name}
    try:
        with_it, without = (KArAtConfig(**{"basis": family, **given}) for given in (VALUES[name], beside))
    except ValueError:
        return
    found, plain = outcome(use, with_it), outcome(use, without)
    assert outcome(use, KArAtConfig(basis=FAMILIES[0])) is not None
    if found is None:
        return
    assert plain is not None
    assert found[0] != plain[0] or not torch.equal(found[1], plain[1]), (
        f"{use.__name__} takes {name} with {family} and ignores it: refuse it, see OF_EDGES, OF_GRIDS and OF_MODELS "
        "of karat/operator/rules.py"
    )


@pytest.mark.parametrize("name", VALUES)
def test_every_setting_is_exported_saved_and_carried_to_another_grid(name: str, tmp_path: Path) -> None:
    config = KArAtConfig(**VALUES[name])
    sizes = VIT | {"depth": 2 if "blocks" in VALUES[name] else 1}
    model = KArAtModel.create("vit_tiny_patch16_224", str(config), num_classes=4, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gates and biases start at zero: every part speaks
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 16, 16)
    wanted = model(images)
    model.save_pretrained(tmp_path)
    assert torch.equal(KArAtModel.from_pretrained(tmp_path)(images), wanted)
    exported = torch.export.export(model.backbone, (images,)).module()
    torch.testing.assert_close(exported(images), wanted, rtol=1e-4, atol=1e-5)
    karat.resample_tokens(model.backbone, img_size=24)
    assert model(torch.randn(1, 3, 24, 24)).isfinite().all()


@pytest.mark.parametrize("name", VALUES)
@torch.no_grad()
def test_every_setting_is_what_attend_computes_and_what_analyses_see(name: str) -> None:
    op = KArAtOperator(3, 9, KArAtConfig(**VALUES[name])).double()
    for parameter in op.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64).unbind()
    scores = q @ k.mT / 8**0.5
    torch.testing.assert_close(op.attend(q, k, v), op(scores) @ v)


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_the_power_of_every_setting_is_what_it_says(name: str) -> None:
    """`power` of its order, by which it is started, with unit scores."""
    op = KArAtOperator(3, 9, KArAtConfig(**VALUES[name] | {"init": "paper"})).double()
    for layer in op.layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
    found = op(torch.randn(4096, 3, 9, 9, dtype=torch.float64)).square().sum(-1).mean((0, 2))
    torch.testing.assert_close(op.order.power(op), found, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", TELLS)
def test_what_every_setting_learns_is_not_decayed(name: str) -> None:
    config = KArAtConfig(**VALUES[name])
    model, plain = (karat.create_model("vit_tiny_patch16_224", one, **VIT) for one in (config, "softmax"))
    own = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert own <= model.no_weight_decay()


@pytest.mark.parametrize("name", VALUES)
def test_the_papers_way_has_a_setting_or_says_that_it_lacks_it(name: str) -> None:
    config = KArAtConfig(**VALUES[name])
    op = KArAtOperator(3, 9, config)
    q, k, v = torch.randn(3, 2, 3, 9, 8).unbind()
    if paper_way.missing(config):
        with pytest.raises(ValueError, match="the materialising baseline can't do"):
            paper_way.attend(op, q, k, v)
    else:
        torch.testing.assert_close(paper_way.attend(op, q, k, v), op.attend(q, k, v), rtol=1e-3, atol=1e-4)
