"""Scores and attention handed out by karat.record, for learnable and softmax attention alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import karat
from karat.models.attention import KArAtAttention, token_inputs, window_inputs
from support.small_models import SMALL, images, small_model

NAMES = {
    "vit": ["blocks.0.attn", "blocks.1.attn"],
    "convit": [f"blocks.{i}.attn" for i in range(4)],
    "swin": [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)],
}


@pytest.mark.parametrize("attention", ["softmax", "g3b"])
@pytest.mark.parametrize("name", SMALL)
def test_the_output_is_untouched_and_hooks_go(name: str, attention: str) -> None:
    model, x = small_model(name, attention).eval(), images(name)
    before = model(x)
    with karat.record(model) as intermediates:
        inside = model(x)
    assert torch.equal(inside, before)
    assert not any(module._forward_hooks for module in model.modules())
    if name in NAMES:
        assert list(intermediates) == NAMES[name]
    for entry in intermediates.values():
        assert entry.scores.shape == entry.attention.shape
        assert entry.scores.shape[-1] == entry.scores.shape[-2]


def note(
    seen: dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]],
    name: str,
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    out: torch.Tensor,
) -> None:
    seen[name] = (module, args[0], out)


@pytest.mark.parametrize("name", SMALL)
def test_recorded_attention_makes_the_output_of_its_module(name: str) -> None:
    """concat_h(attention_h · v_h) through norm and projection is what the module returned, whatever its kind."""
    for attention in ("softmax", "g3b"):
        model = small_model(name, attention).double().eval()
        seen: dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]] = {}
        for module_name, module in model.named_modules():
            if module_name.endswith(".attn"):
                module.register_forward_hook(partial(note, seen, module_name))
        with karat.record(model) as intermediates:
            model(images(name).double())
        assert set(seen) == set(intermediates)
        for module_name, (module, x, out) in seen.items():
            heads = intermediates[module_name].attention.shape[1]
            weight, bias = (
                (module.v.weight, module.v.bias) if hasattr(module, "v") else (module.qkv.weight, module.qkv.bias)
            )
            v = nn.functional.linear(x, weight, bias)[..., -module.proj.in_features :]
            mixed = intermediates[module_name].attention @ torch.stack(v.chunk(heads, dim=-1), dim=1)
            mixed = torch.cat(mixed.unbind(1), dim=-1)
            torch.testing.assert_close(module.proj(getattr(module, "norm", nn.Identity())(mixed)), out)


@pytest.mark.parametrize("name", SMALL)
def test_softmax_rows_are_distributions(name: str) -> None:
    model = small_model(name).double().eval()
    with karat.record(model) as intermediates, torch.no_grad():
        model(images(name).double())
    for entry in intermediates.values():
        sums = entry.attention.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (entry.attention >= 0).all()


def test_scores_include_the_bias_and_masks_come_along() -> None:
    model = small_model("swin", "g3b").double().eval()
    with karat.record(model) as intermediates, torch.no_grad():
        model(images("swin").double())
    shifted = intermediates["layers.0.blocks.1.attn"]
    assert intermediates["layers.0.blocks.0.attn"].mask is None
    assert shifted.mask is not None
    assert shifted.mask.dtype == torch.bool
    masked = ~shifted.mask.expand_as(shifted.attention)
    assert masked.any()
    assert (shifted.attention[masked] == 0).all()
    attn = model.layers[0].blocks[0].attn
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    inputs = window_inputs(attn, x)
    expected = inputs.q @ inputs.k.mT * attn.scale + attn._get_rel_pos_bias()
    torch.testing.assert_close(inputs.scores, expected)


def test_scores_are_scaled_products() -> None:
    model = small_model("vit", "g3b").double().eval()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    attn = model.blocks[0].attn
    with karat.record(attn) as intermediates:
        attn(x)
    q, k, *_ = token_inputs(attn, x)
    torch.testing.assert_close(intermediates[""].scores, q @ k.mT / 8**0.5)


def test_attention_is_recorded_before_dropout_and_randomness_is_untouched() -> None:
    for name in NAMES:
        model, x = small_model(name, attn_drop_rate=0.5).train(), images(name)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        with karat.record(model) as intermediates:
            assert torch.equal(model(x), expected)
        for entry in intermediates.values():
            sums = entry.attention.sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_hooks_go_when_the_pass_fails() -> None:
    model = small_model("vit", "g3b")

    with pytest.raises(AssertionError), karat.record(model):
        model(torch.randn(1, 3, 20, 20))
    assert not any(module._forward_hooks for module in model.modules())


def test_universal_operators_are_recorded_block_by_block() -> None:
    model = small_model("vit", "g3u").eval()
    with karat.record(model) as intermediates:
        model(images("vit"))
    assert list(intermediates) == NAMES["vit"]
    assert all(isinstance(model.get_submodule(name), KArAtAttention) for name in intermediates)


@pytest.mark.parametrize("attention", ["softmax", "g3b"])
def test_a_record_within_another_leaves_it_whole(attention: str) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 2).eval()
    attached = karat.karatize(
        encoder, "g3b,blocks=(0,)" if attention == "softmax" else attention, torch.randn(2, 9, 24)
    )
    for model, x in ((attached, torch.randn(2, 9, 24)), (small_model("vit", attention).eval(), images("vit"))):
        with karat.record(model) as outer:
            with karat.record(model) as inner:
                model(x)
            assert outer.keys() == inner.keys() != set()
            outer.clear()
            model(x)
            assert outer.keys() == inner.keys()


def test_a_model_without_attention() -> None:
    with (
        pytest.raises(ValueError, match=r"Linear has no attention that karat\.record knows"),
        karat.record(nn.Linear(2, 2)),
    ):
        pass
