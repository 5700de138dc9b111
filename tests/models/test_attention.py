"""Attention modules around an operator: the formula, masks, norms, dropout, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.convit import MHSA
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn

from karat.models.attention import KArAtAttention, KArAtWindowAttention, split_mask
from karat.models.backbones import BACKBONES as records
from karat.models.backbones import backbone_of, is_unknown_attention, refusal
from karat.operator.operator import KArAtOperator
from support.small_models import BACKBONES, SMALL, images, small_model

N, DIM, HEADS = 9, 12, 3


def vit_attention(operator: str = "g3b", **kwargs: object) -> KArAtAttention:
    attn = Attention(DIM, num_heads=HEADS, qkv_bias=True, **kwargs)
    return KArAtAttention(attn, KArAtOperator(HEADS, N, operator)).double()


def split(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B,H,N,D), head by head, from the weights."""
    parts = nn.functional.linear(x, attn.qkv.weight, attn.qkv.bias).split(DIM, dim=-1)
    return tuple(torch.stack(part.split(DIM // HEADS, dim=-1), dim=1) for part in parts)


def merged(attn: nn.Module, heads: torch.Tensor) -> torch.Tensor:
    return attn.proj(torch.cat(heads.unbind(1), dim=-1))


@pytest.mark.parametrize("kind", [Attention, MHSA])
def test_output_is_sigma_times_v_through_the_projection(kind: type[nn.Module]) -> None:
    attn = KArAtAttention(kind(DIM, num_heads=HEADS, qkv_bias=True), KArAtOperator(HEADS, N, "g3b")).double()
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    q, k, v = split(attn, x)
    sigma = attn.operator(q @ k.mT / (DIM // HEADS) ** 0.5)
    torch.testing.assert_close(attn(x), merged(attn, sigma @ v))


def test_norms_and_gate_of_the_replaced_module_are_kept() -> None:
    attn = vit_attention(qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, gated=True)
    for norm in (attn.q_norm, attn.k_norm, attn.norm):
        nn.init.normal_(norm.weight)
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    q, k, v = split(attn, x)
    sigma = attn.operator(attn.q_norm(q) @ attn.k_norm(k).mT / (DIM // HEADS) ** 0.5)
    heads = torch.cat((sigma @ v).unbind(1), dim=-1)
    torch.testing.assert_close(attn(x), attn.proj(attn.norm(heads) * attn.gate(x).sigmoid()))


def test_masks_of_all_kinds_agree() -> None:
    attn = vit_attention()
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    mask = torch.rand(2, 1, N, N) > 0.4
    expected = attn(x, attn_mask=mask)
    for low in (-100.0, -torch.inf, torch.finfo(torch.float64).min):
        additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)
        torch.testing.assert_close(attn(x, attn_mask=additive), expected)
    past = torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(attn(x, is_causal=True), attn(x, attn_mask=past))
    torch.testing.assert_close(attn(x, attn_mask=mask, is_causal=True), attn(x, attn_mask=past & mask))


def test_an_additive_mask_that_is_no_mask_is_a_bias() -> None:
    attn = vit_attention()
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    bias = torch.randn(1, HEADS, N, N, dtype=torch.float64)
    q, k, v = split(attn, x)
    sigma = attn.operator(q @ k.mT / (DIM // HEADS) ** 0.5 + bias)
    torch.testing.assert_close(attn(x, attn_mask=bias), merged(attn, sigma @ v))


def test_split_mask_keeps_what_is_boolean() -> None:
    mask = torch.rand(3, 3) > 0.5
    assert split_mask(None) == (None, None)
    assert split_mask(mask) == (None, mask)


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float64])
def test_a_mask_of_whole_numbers_is_neither_kind(dtype: torch.dtype) -> None:
    """Added to the scores, as it was, 0 would hide nothing."""
    attn, x, mask = vit_attention(), torch.randn(2, N, DIM).double(), torch.ones(N, N, dtype=dtype)
    if dtype.is_floating_point:
        attn(x, mask)
        return
    with pytest.raises(ValueError, match=r"boolean .True = takes part. or added .* got torch\.\w+; write mask.bool"):
        attn(x, mask)


def test_a_masked_token_has_no_influence() -> None:
    attn = vit_attention()
    keep = torch.ones(N, dtype=torch.bool)
    keep[4] = False
    x = torch.randn(1, N, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, 4] = 1000.0
    mask = keep.expand(1, 1, N, N)
    torch.testing.assert_close(attn(x, mask)[:, keep], attn(other, mask)[:, keep])


def test_attention_dropout_acts_in_training_only() -> None:
    attn = vit_attention(attn_drop=0.5)
    x = torch.randn(1, N, DIM, dtype=torch.float64)
    assert not torch.equal(attn.train()(x), attn(x))
    q, k, v = split(attn, x)
    sigma = attn.operator(q @ k.mT / (DIM // HEADS) ** 0.5)
    torch.testing.assert_close(attn.eval()(x), merged(attn, sigma @ v))


def test_the_replaced_parts_are_the_same_objects_and_the_mode_is_kept() -> None:
    source = Attention(DIM, num_heads=HEADS).eval()
    attn = KArAtAttention(source, KArAtOperator(HEADS, N, "g3b"))
    assert attn.qkv is source.qkv
    assert attn.proj is source.proj
    assert not attn.training


def test_another_number_of_tokens_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=rf"{N} tokens and got {N + 1}.*resample_tokens"):
        vit_attention()(torch.randn(1, N + 1, DIM, dtype=torch.float64))


# Swin


def window_attention(config: str = "g3b") -> KArAtWindowAttention:
    attn = WindowAttention(DIM, num_heads=HEADS, window_size=3)
    nn.init.normal_(attn.relative_position_bias_table)
    return KArAtWindowAttention(attn, KArAtOperator(HEADS, N, config)).double()


def test_window_bias_is_added_before_the_operator() -> None:
    attn = window_attention()
    x = torch.randn(4, N, DIM, dtype=torch.float64)
    q, k, v = split(attn, x)
    bias = torch.empty(HEADS, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):  # the table is indexed by how many rows and columns i and j are apart
            bias[:, i, j] = attn.relative_position_bias_table[(i // 3 - j // 3 + 2) * 5 + i % 3 - j % 3 + 2]
    sigma = attn.operator(q @ k.mT / (DIM // HEADS) ** 0.5 + bias)
    torch.testing.assert_close(attn(x), merged(attn, sigma @ v))


def test_shifted_windows_mask_pairs_exactly() -> None:
    attn = window_attention()
    regions = torch.tensor([[0, 0, 1, 0, 0, 1, 2, 2, 3], [0] * 9])
    neighbours = regions[:, :, None] == regions[:, None, :]
    additive = torch.zeros(2, N, N, dtype=torch.float64).masked_fill(~neighbours, -100.0)
    x = torch.randn(4, N, DIM, dtype=torch.float64)  # two images of two windows
    out = attn(x, mask=additive)
    torch.testing.assert_close(attn(x, mask=neighbours), out)
    other = x.clone()
    other[0, regions[0] == 1] = 50.0  # foreign to the other regions of the first image's first window
    changed = attn(other, mask=additive)
    torch.testing.assert_close(changed[0, regions[0] != 1], out[0, regions[0] != 1])
    torch.testing.assert_close(changed[1:], out[1:])


@pytest.mark.parametrize("name", SMALL)
def test_a_residual_operator_starts_as_the_softmax_model(name: str) -> None:
    """σ = softmax + 0 · operator: every adapter passes q, k, v, bias and masks on as timm's own attention uses them."""
    softmax = small_model(name).double().eval()
    learnable = small_model(name, "g3b,residual=softmax").double().eval()
    missing, unexpected = learnable.load_state_dict(softmax.state_dict(), strict=False)
    assert not unexpected
    assert all(".operator." in key for key in missing)
    x = images(name).double()
    torch.testing.assert_close(learnable(x), softmax(x))


@pytest.mark.parametrize("settings", ["", ",rank=None", ",order=PhiPhi", ",impl=tiled"])
@pytest.mark.parametrize("name", BACKBONES)
def test_at_gate_zero_logits_are_softmaxs_to_a_millionth(name: str, settings: str) -> None:
    """In float32, through the one pass over the scores."""
    softmax = small_model(name).eval()
    learnable = small_model(name, f"g3b,residual=softmax{settings}").eval()
    learnable.load_state_dict(softmax.state_dict(), strict=False)
    x = images(name)
    assert (learnable(x) - softmax(x)).abs().max() <= 1e-6


# Refusals


class OwnAttention(Attention):
    pass


def pruned_attention() -> Attention:
    attn = Attention(DIM, num_heads=HEADS)
    attn.num_heads, attn.qkv, attn.proj = 2, nn.Linear(DIM, 24), nn.Linear(8, DIM)
    return attn


def test_a_refusal_says_why() -> None:
    assert "heads were pruned" in str(refusal(pruned_attention()))


@pytest.mark.parametrize(
    "module",
    [
        OwnAttention(DIM, num_heads=HEADS),
        nn.MultiheadAttention(DIM, HEADS),
        timm.layers.AttentionRope(DIM, num_heads=HEADS),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_no_record_knows_is_not_taken_for_what_one_knows(module: nn.Module) -> None:
    assert is_unknown_attention(module)
    assert refusal(module) is None


def test_what_is_no_attention_is_not_refused() -> None:
    for module in (
        nn.Linear(2, 2),
        timm.layers.AttentionPoolLatent(DIM, num_heads=HEADS),
        Attention(DIM, num_heads=HEADS),
    ):
        assert refusal(module) is None
        assert not is_unknown_attention(module)


def test_every_record_has_a_model_in_these_tests() -> None:
    models = {name: small_model(name) for name in SMALL}
    found = [backbone_of(models[name]) for name in BACKBONES]
    without = [family.__name__ for family, record in records.items() if not any(one is record for one in found)]
    assert not without, f"no name in BACKBONES of tests/support/small_models.py is a small {without}"
    kinds = {type(module) for model in models.values() for module in model.modules()}
    unseen = {kind.__name__ for record in records.values() for kind in record.attentions if kind not in kinds}
    assert not unseen, f"no model in SMALL of tests/support/small_models.py has attention of these classes: {unseen}"
