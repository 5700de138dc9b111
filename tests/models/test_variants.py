"""Every variant and control on whole models: where it starts, which blocks, shared, trained, on other grids."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import karat
from karat.models.backbones import attention_sites
from karat.runs.recipes import RECIPES
from karat.train.optim import parameter_groups
from support.small_models import images, small_model

KINDS = (
    "g3b",
    "g2u,rank=None,order=Pointwise",
    "g2u,rank=2,order=Pointwise,position=query",
    "static-b",
    "static-u,rank=None",
)
STARTS = ("", ",gate=1,init_scale=0")
BEGIN_AS_SOFTMAX = [
    *(f"{kind},residual=softmax{start}" for kind in KINDS for start in STARTS),
    "g2b,residual=softmax,softmax_heads=1",
    "g2b,residual=softmax,blocks=first,position_bias=relative",
    "recommended",
]


@pytest.mark.parametrize("attention", BEGIN_AS_SOFTMAX)
@pytest.mark.parametrize("name", ["vit", "convit"])
def test_logits_at_gate_zero_are_the_softmax_model_s(name: str, attention: str) -> None:
    softmax = small_model(name).eval()
    model = karat.karatize(copy.deepcopy(softmax), attention)
    x = images(name)
    torch.testing.assert_close(model(x), softmax(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("blocks", "depth", "chosen"),
    [("first", 4, [0, 1]), ("first", 5, [0, 1, 2]), ("first", 1, [0]), ("(1,3)", 5, [1, 3])],
)
@pytest.mark.parametrize("attention", ["g2b,rank=2", "softmax,position_bias=relative"])
def test_blocks_by_word(attention: str, blocks: str, depth: int, chosen: list[int]) -> None:
    model = small_model("vit", f"{attention},blocks={blocks}", depth=depth)
    ours = [
        i for i, site in enumerate(attention_sites(model)) if type(site.module).__module__ == "karat.models.attention"
    ]
    assert ours == chosen


def test_words_count_the_blocks_that_can_be_converted() -> None:
    model = small_model("convit", "g2b,rank=2,blocks=first")  # two gated blocks, then two plain ones
    assert list(karat.karat_operators(model)) == ["blocks.2.attn.operator"]


SHARED = ["g2u,rank=None,order=Pointwise", "static-u,rank=2", "static-u,rank=None", "g2u,position=query"]
SHARED += ["g2u,rank=2,order=Pointwise,position=query"]
SHARED += ["g2u,residual=softmax"]


@pytest.mark.parametrize("attention", SHARED)
def test_one_operator_for_all_blocks(attention: str) -> None:
    model = small_model("vit", attention)
    assert list(karat.karat_operators(model)) == ["karat_operator"]
    model(images("vit")).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.karat_operator.parameters())


@pytest.mark.parametrize("attention", [*SHARED, "static-u,residual=softmax"])
def test_coefficients_gates_and_matrices_form_a_group_of_their_own(attention: str) -> None:
    model = small_model("vit", attention)
    recipe = RECIPES["vit"].override(operator_lr_scale=5.0, coefficient_weight_decay=0.01)
    own = {id(parameter) for parameter in model.karat_operator.parameters()}
    groups = [group for group in parameter_groups(model, recipe) if {id(p) for p in group["params"]} & own]
    assert {id(p) for group in groups for p in group["params"]} == own
    assert {(group["weight_decay"], group["lr_scale"]) for group in groups} == {(0.01, 5.0)}


@pytest.mark.parametrize("attention", ["g2b,position=query,residual=softmax", "static-b,softmax_heads=1", SHARED[0]])
def test_the_new_operators_in_windows_and_with_images_of_any_size(attention: str) -> None:
    if attention.startswith("g2b") or attention.startswith("static-b"):
        assert small_model("swin", attention)(images("swin")).isfinite().all()
    model = small_model("vit", attention, dynamic_img_size=True).eval()
    for operator in karat.karat_operators(model).values():
        for parameter in operator.parameters():
            nn.init.normal_(parameter)
    x = torch.randn(1, 3, 24, 40)
    resampled = karat.resample_tokens(copy.deepcopy(model), img_size=(24, 40))
    torch.testing.assert_close(model(x), resampled(x))
