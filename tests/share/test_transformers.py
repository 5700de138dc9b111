"""transformers' ViT with learnable attention: the plain operator by hand, and what is saved comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from karat import KArAtOperator, karat_operators

transformers = pytest.importorskip("transformers", reason="an optional extra: pip install 'karat[transformers]'")

from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTForImageClassification, ViTModel  # noqa: E402

from karat.share.transformers import from_pretrained, karatize_hf  # noqa: E402

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
}
SPECS = ("g3b", "dog-u", "g2b,residual=softmax,softmax_heads=1", "bspline(grid=3)-b,order=PhiW,blocks=(1,)")
SPECS += ("static-u,rank=2,residual=softmax,blocks=first", "g2b,rank=None,order=Pointwise,blocks=(0,)")


def vit(spec: str) -> ViTForImageClassification:
    model = karatize_hf(ViTForImageClassification(ViTConfig(**SIZES, num_labels=4)), spec).eval()
    with torch.no_grad():
        for operator in karat_operators(model).values():
            for parameter in operator.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(model: ViTForImageClassification, pixels: torch.Tensor) -> torch.Tensor:
    """ViT written out, with σ from the operator's other face: σ(q kᵀ/√D) v."""
    x = model.vit.embeddings(pixels)
    B, N, C = x.shape
    for layer in model.vit.layers:
        attn, y = layer.attention, layer.layernorm_before(x)
        q, k, v = (p(y).view(B, N, 3, C // 3).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        scores = q @ k.transpose(-2, -1) * (C // 3) ** -0.5
        operator = getattr(attn, "operator", None)
        sigma = scores.softmax(-1) if operator is None else operator(scores)
        x = x + attn.o_proj((sigma @ v).transpose(1, 2).reshape(B, N, C))
        x = x + layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(layer.layernorm_after(x))))
    return model.classifier(model.vit.layernorm(x)[:, 0])


@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_those_of_the_plain_operator(spec: str) -> None:
    model = vit(spec)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model(pixels).logits, by_hand(model, pixels), atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded_to_the_bit(spec: str, tmp_path: Path) -> None:
    model = vit(spec)
    pixels = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = from_pretrained(ViTForImageClassification, tmp_path).eval()
    assert type(again) is ViTForImageClassification
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_attentions_are_handed_out() -> None:
    model = vit("g2b,blocks=(1,)")
    pixels = torch.randn(1, 3, 16, 16)
    first, second = model(pixels, output_attentions=True).attentions
    assert torch.allclose(first.sum(-1), torch.ones(1, 3, 17))  # softmax stayed
    assert second.shape == (1, 3, 17, 17)
    assert not torch.allclose(second.sum(-1), torch.ones(1, 3, 17), atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "karat"])
def test_no_implementation_puts_softmax_in_their_place(implementation: str) -> None:
    model = vit("g2b,blocks=(1,)")
    pixels = torch.randn(2, 3, 16, 16)
    wanted = model(pixels).logits
    model.set_attn_implementation(implementation)
    assert torch.equal(model(pixels).logits, wanted)


def test_attentions_by_the_config_that_gradients_reach(tmp_path: Path) -> None:
    model = vit("g2b,blocks=(1,)")
    pixels = torch.randn(2, 3, 16, 16)
    wanted = model(pixels).logits
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    for made in (model, from_pretrained(ViTForImageClassification, tmp_path).eval()):
        out = made(pixels)
        assert torch.allclose(out.logits, wanted, atol=1e-5)
        for sigma in out.attentions:
            sigma.retain_grad()
        out.logits.sum().backward()
        assert all(sigma.grad.abs().sum() > 0 for sigma in out.attentions)


def test_an_auto_class_finds_the_model(tmp_path: Path) -> None:
    model = vit("g2u")
    model.save_pretrained(tmp_path)
    again = from_pretrained(transformers.AutoModelForImageClassification, tmp_path).eval()
    assert type(again) is ViTForImageClassification
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    with pytest.raises(ValueError, match="AutoModelForCausalLM has no model of ViTConfig"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


def test_a_model_that_lost_its_operators_says_so(tmp_path: Path) -> None:
    """transformers' loader, with karat imported: the operators are left out, and nothing is computed without them."""
    vit("g2b").save_pretrained(tmp_path)
    lost = ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no operators: load it with karat\.integrations\.transformers"):
        lost(torch.randn(1, 3, 16, 16))


def test_transformers_without_karat_refuses_a_converted_folder(tmp_path: Path) -> None:
    vit("g2b").save_pretrained(tmp_path)
    script = f"import transformers as t; t.ViTForImageClassification.from_pretrained({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "karat" in ran.stderr.splitlines()[-1]


def test_a_mask_of_tokens_reaches_the_operator() -> None:
    model = karatize_hf(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), "g2b").eval()
    attn, x = model.layers[0].attention, torch.randn(2, 17, 24)
    mask = torch.rand(2, 1, 1, 17) > 0.3
    out, _ = attn(x, mask)
    q, k, v = (p(x).view(2, 17, 3, 8).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    sigma = attn.operator(q @ k.transpose(-2, -1) * 8**-0.5, mask)
    assert torch.allclose(out, attn.o_proj((sigma @ v).transpose(1, 2).reshape(2, 17, 24)), atol=1e-5)


def test_universal_is_one_operator_with_gradients() -> None:
    model = vit("g2u").train()
    assert list(karat_operators(model)) == ["karat_operator"]
    assert isinstance(model.vit.layers[1].attention.operator, KArAtOperator)
    assert "karat_operator.W" in model.no_weight_decay()
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.karat_operator.parameters())


def test_deit_has_two_more_tokens() -> None:
    model = karatize_hf(DeiTModel(DeiTConfig(**SIZES)), "g1b").eval()
    assert next(iter(karat_operators(model).values())).num_tokens == 18
    assert model(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 18, 24)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has learnable attention already"):
        karatize_hf(vit("g1b"), "g1b")
    with pytest.raises(ValueError, match="there is no block 2"):
        vit("g1b,blocks=(2,)")
    with pytest.raises(ValueError, match="position_bias=relative: that is for timm's models"):
        vit("softmax,position_bias=relative")
    with pytest.raises(ValueError, match="softmax_heads=3"):
        vit("g1b,softmax_heads=3")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    with pytest.raises(ValueError, match="BertModel has no attention that karat knows"):
        karatize_hf(bert, "g1b")
    with pytest.raises(ValueError, match="made for 17 tokens and got 65"):
        vit("g1b")(torch.randn(1, 3, 32, 32), interpolate_pos_encoding=True)
    ViTModel(ViTConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no 'karat_attention' in its config"):
        from_pretrained(ViTModel, tmp_path)
    with pytest.raises(ValueError, match="can't be read"):
        from_pretrained(ViTModel, tmp_path / "nowhere")
    model = vit("g1b")
    model.vit.layers[1].attention.operator = None
    model.save_pretrained(tmp_path / "torn")
    with pytest.raises(ValueError, match=r"missing keys .*operator"):
        from_pretrained(ViTForImageClassification, tmp_path / "torn")


def test_what_was_saved_before_there_were_factors_has_factors_of_one(tmp_path: Path) -> None:
    model = vit("g3b")
    for operator in karat_operators(model).values():
        for name, buffer in operator.named_buffers():
            if name.endswith("factor"):
                buffer.fill_(1.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.endswith("factor")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = from_pretrained(ViTForImageClassification, tmp_path).eval()
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
