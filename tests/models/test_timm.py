"""timm's habits: what its own tests of models ask of a model by name, asked of converted ones."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import group_parameters
from torch import Tensor, nn

import karat
from karat.models.create import REGISTERED
from karat.models.kan.mlp import MLPS
from karat.models.karatize import NoWeightDecay
from support.small_models import BACKBONES, SMALL, VIT, images

BY_NAME = {name: (f"karat_{base}", arguments) for name, (base, arguments, _, _) in SMALL.items() if base in REGISTERED}
NOT_CONVIT = [name for name in BY_NAME if name != "convit"]  # timm's own has no checkpoints and isn't for torch.fx


def by_name(name: str, **kwargs: Any) -> nn.Module:
    """A small model of a registered name; always the same numbers."""
    registered, arguments = BY_NAME[name]
    torch.manual_seed(0)
    return timm.create_model(registered, **{"num_classes": 4, **arguments, **kwargs})


@pytest.mark.parametrize("base", REGISTERED)
def test_what_timm_knows_of_a_model_it_knows_of_the_converted_one(base: str) -> None:
    ours, theirs = (timm.models.get_arch_pretrained_cfgs(name) for name in (f"karat_{base}", base))
    assert [f"karat_{name}" for name in theirs] == list(ours)
    for name in (base, *theirs):
        mine, its = (timm.models.get_pretrained_cfg(each).to_dict() for each in (f"karat_{name}", name))
        assert mine.pop("architecture") == f"karat_{its.pop('architecture')}"
        assert mine == its


@pytest.mark.parametrize("name", BY_NAME)
def test_data_are_resolved(name: str) -> None:
    config = timm.data.resolve_model_data_config(by_name(name))
    assert config == timm.data.resolve_data_config(pretrained_cfg=by_name(name).pretrained_cfg)
    assert config["input_size"] == timm.models.get_pretrained_cfg(BY_NAME[name][0]).input_size


@pytest.mark.parametrize("create", [timm.create_model, karat.create_model])
@pytest.mark.parametrize("name", BY_NAME)
def test_features_are_those_of_the_whole_model(name: str, create: Any) -> None:
    registered, arguments = BY_NAME[name]
    whole, x = by_name(name).eval(), images(name)
    torch.manual_seed(0)
    features = create(registered, features_only=True, out_indices=(0, 1), num_classes=4, **arguments).eval()
    expected = whole.forward_intermediates(x, indices=(0, 1), intermediates_only=True, output_fmt="NCHW")
    for found, wanted, channels in zip(features(x), expected, features.feature_info.channels(), strict=True):
        found = found.permute(0, 3, 1, 2) if name == "swin" else found  # as timm's
        torch.testing.assert_close(found, wanted)
        assert found.shape[1] == channels
    assert type(features) is type(
        timm.create_model(SMALL[name][0], features_only=True, out_indices=(0, 1), **arguments)
    )
    operators = karat.karat_operators(features)
    assert all(any(key.startswith(prefix) for key in features.no_weight_decay()) for prefix in operators)
    again = pickle.loads(pickle.dumps(copy.deepcopy(features)))
    torch.testing.assert_close(again(x), features(x))


def test_features_are_of_the_models_blocks_and_not_of_those_that_are_left() -> None:
    settings = {"features_only": True, "out_indices": (0,), **VIT}
    assert not karat.karat_operators(karat.create_model("vit_tiny_patch16_224", "g3b,blocks=(1,)", **settings))
    shared = karat.create_model("vit_tiny_patch16_224", "g3u", **settings)
    assert list(karat.karat_operators(shared)) == ["model.karat_operator"]
    with pytest.raises(ValueError, match="no multiple of the patch size"):
        karat.create_model("vit_tiny_patch16_224", "g3b", **settings | {"img_size": 18})
    with pytest.raises(ValueError, match="Sequential takes the blocks out of their model"):
        karat.create_model("vit_tiny_patch16_224", "g3u", feature_cls=lambda model, **_: model.blocks, **settings)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_features_of_attached_attention(name: str) -> None:
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "out_indices": (1,)}
    features = karat.create_model(name, "g3b", features_only=True, **small)
    assert len(karat.karat_operators(features)) == 2
    assert features(torch.randn(2, 3, 32, 32))[0].shape == (2, 24, 2, 2)


@pytest.mark.parametrize("attention", [{}, {"attention": "dog-b,residual=softmax"}])
@pytest.mark.parametrize("name", [name for name in BACKBONES if name in BY_NAME])
def test_what_timm_saves_it_loads(name: str, attention: dict[str, str], tmp_path: Path) -> None:
    registered, arguments = BY_NAME[name]
    model, x = karat.create_model(registered, num_classes=4, **attention, **arguments).eval(), images(name)
    timm.models.save_for_hf(model, tmp_path)
    for create in (timm.create_model, karat.create_model):
        assert torch.equal(create(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1,)).eval()
    (found,), (expected,) = features(x), model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(found.permute(0, 3, 1, 2) if name == "swin" else found, expected)


def test_habits_of_attached_attention() -> None:
    model = karat.create_model("cait_xxs24_224", "g3b", img_size=32, depth=1, num_classes=4)
    operators, x = karat.karat_operators(model), torch.randn(2, 3, 32, 32)
    model.reset_classifier(7)
    assert karat.karat_operators(model) == operators
    expected = model.eval()(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    none = model(x[:0])  # as timm's own
    assert none.shape == (0, 7)
    none.sum().backward()
    assert not any(p.grad.any() for op in operators.values() for p in op.parameters())


@pytest.mark.parametrize("name", BY_NAME)
def test_intermediates_end_in_the_features(name: str) -> None:
    model, x = by_name(name).eval(), images(name)
    last, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    assert [each.shape[1] for each in intermediates] == info.channels()


@pytest.mark.parametrize("name", BY_NAME)
def test_another_classifier(name: str) -> None:
    model, x = by_name(name).eval(), images(name)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    operators = karat.karat_operators(model)
    model.requires_grad_(False)
    model.reset_classifier(0)
    found = model(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, pooled)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert karat.karat_operators(model) == operators
    assert all(key.startswith("head") for key, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NOT_CONVIT)
def test_checkpointing_changes_no_number(name: str) -> None:
    model, x = by_name(name).train(), images(name)
    found = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", BY_NAME)
def test_groups_and_exceptions_name_parameters_that_are_there(name: str) -> None:
    model = by_name(name)
    names = {key for key, _ in model.named_parameters()}
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert names == set(groups)
    assert {key for key in names if ".operator." in key} <= model.no_weight_decay()


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_of_every_model(name: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        by_name(name, not_an_argument=1)
    model = by_name(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = by_name(name).eval()
    model(images(name))
    assert model.to(torch.bfloat16)(images(name).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NOT_CONVIT)
def test_a_graph_of_a_model_has_its_numbers_and_its_gradients(name: str) -> None:
    x = images(name)
    for model in (by_name(name), by_name(name, attention="g3b,residual=softmax,blocks=(1,)")):
        graph = torch.fx.symbolic_trace(model.eval())
        torch.testing.assert_close(graph(x), model(x))
        assert len(karat.karat_operators(graph)) == len(karat.karat_operators(model))
        last = get_graph_node_names(model)[1][-1]
        extractor = create_feature_extractor(model, [last]).eval()
        (found,) = extractor(x).values()
        torch.testing.assert_close(found, model(x))
        model.zero_grad()
        graph(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_graph_without_the_operator_that_blocks_share_is_refused() -> None:
    model = karat.create_model("vit_tiny_patch16_224", "g3u", **VIT)
    attached = karat.create_model("beit_base_patch16_224", "g3u", img_size=32, embed_dim=24, depth=2, num_heads=2)
    for each in (model, attached):
        with pytest.raises(ValueError, match=r"keeps blocks.0.attn alone.*torch\.export"):
            torch.fx.symbolic_trace(each)
    with pytest.raises(ValueError, match="can't be traced alone"):
        torch.fx.symbolic_trace(karat.SequenceAttention(16, 4, 7))


class Sequences(nn.Module):
    """Self- and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = karat.SequenceAttention(16, 4, 7), karat.CrossAttention(16, 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)


def test_graphs_of_everything_else() -> None:
    cases = [(Sequences(), torch.randn(2, 5, 16))]
    for mlp in MLPS:
        cases.append((karat.create_model("vit_tiny_patch16_224", "g3b", mlp=mlp, **VIT), images("vit")))
    beit = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    cases.append((karat.create_model("beit_base_patch16_224", "g3b", **beit), torch.randn(2, 3, 32, 32)))
    cases.append((karat.create_model("vit_tiny_patch16_224", "softmax,position_bias=relative", **VIT), images("vit")))
    for model, x in cases:
        graph = torch.fx.symbolic_trace(model.eval())
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")
def test_torchscript_is_one_line() -> None:
    beit = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    models = [
        karat.create_model("vit_tiny_patch16_224", "g3b", **VIT),
        karat.create_model("vit_tiny_patch16_224", "softmax,position_bias=relative", **VIT),
        karat.create_model("beit_base_patch16_224", "g3b", **beit),
        karat.KArAtOperator(3, 5, "g3b"),
    ]
    for model in models:
        with pytest.raises(
            ValueError, match=r"can't be scripted: TorchScript is deprecated; use torch\.export"
        ) as caught:
            torch.jit.script(model)
        assert "\n" not in str(caught.value)


def with_layer(spec: str = "g3b", tokens: int = 17, name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    layer = karat.attn_layer(spec, num_tokens=tokens)
    return timm.create_model(name, attn_layer=layer, num_classes=4, **{**VIT, **kwargs})


LAYERS = [
    ("vit_tiny_patch16_224", 17, {}),
    ("vit_tiny_patch16_224", 16, {"class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", 21, {"reg_tokens": 4, "no_embed_class": True}),
    ("vit_tiny_patch16_224", 17, {"qk_norm": True, "scale_attn_norm": True, "qkv_bias": False}),
    ("vit_tiny_patch16_224", 17, {"attn_drop_rate": 0.1, "proj_drop_rate": 0.1}),
    ("deit_tiny_distilled_patch16_224", 18, {}),
    ("deit_tiny_patch16_224", 17, {}),
]


@pytest.mark.parametrize(("name", "tokens", "arguments"), LAYERS)
def test_a_layer_gives_the_model_that_karatize_gives(name: str, tokens: int, arguments: dict[str, Any]) -> None:
    model = with_layer(tokens=tokens, name=name, **arguments).eval()
    like = karat.karatize(timm.create_model(name, num_classes=4, **{**VIT, **arguments}), "g3b").eval()
    assert list(model.state_dict()) == list(like.state_dict())
    like.load_state_dict(model.state_dict())
    x = images("vit")
    assert torch.equal(model(x), like(x))
    assert model.no_weight_decay() == like.no_weight_decay()
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, like):
        each.set_input_size(img_size=(24, 24))
    assert torch.equal(model(torch.ones(1, 3, 24, 24)), like(torch.ones(1, 3, 24, 24)))


def test_a_layers_model_takes_images_of_any_size_and_has_features() -> None:
    model = with_layer(dynamic_img_size=True).eval()
    like = karat.karatize(timm.create_model("vit_tiny_patch16_224", num_classes=4, dynamic_img_size=True, **VIT), "g3b")
    like.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(model(x), like.eval()(x))
    features = with_layer(features_only=True, out_indices=(0,))
    assert features(images("vit"))[0].shape == (2, 24, 4, 4)
    assert not torch.nn.modules.module._global_module_registration_hooks


def test_layers_in_threads_finish_each_its_own_model() -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: with_layer(depth=3), range(8)))
    for model in models:
        assert isinstance(model.no_weight_decay, NoWeightDecay)
        assert model.no_weight_decay.model is model


def test_a_layer_alone_is_built_as_timms() -> None:
    layer = karat.attn_layer("g3b,residual=softmax", num_tokens=7)(24, num_heads=3, qkv_bias=True)
    assert layer(torch.randn(2, 7, 24)).shape == (2, 7, 24)
    assert not torch.nn.modules.module._global_module_registration_hooks  # of no other module's concern
    model = karat.create_model("vit_tiny_patch16_224", "g3b", **VIT)  # what is built next is its own
    assert isinstance(model.no_weight_decay, NoWeightDecay)


@pytest.mark.parametrize(
    ("spec", "tokens", "message"),
    [
        ("g3u", 17, "sharing=universal: a layer doesn't know"),
        ("g3b,blocks=(1,)", 17, r"blocks=\(1,\): a layer doesn't know"),
        ("g3b,position_bias=relative", 17, "position_bias=relative: a layer doesn't know"),
        ("softmax", 17, "'softmax' has no operator"),
        ("g3b", 0, "num_tokens must be a whole number >= 1, got 0"),
        ("g3b", True, "num_tokens must be a whole number >= 1, got True"),
        ("g3b", 16, "num_tokens=16, and the model 17 tokens; give num_tokens=17"),
        ("g3b,softmax_heads=3", 17, "softmax_heads=3 leaves no head"),
        ("g3x", 17, "can't read the attention"),
    ],
)
def test_a_layer_refuses_what_it_cannot_know(spec: str, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        with_layer(spec, tokens)
    assert "\n" not in str(caught.value)


def test_a_model_whose_tokens_vary_takes_no_layer() -> None:
    with pytest.raises(ValueError, match="patch_drop_rate"):
        with_layer(patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"made for 17 tokens and got 18.*num_tokens=18"):
        with_layer(name="deit_tiny_distilled_patch16_224")(images("vit"))
