"""Attached attention the other ways that PyTorch runs it: padded, weights wanted, one inside another, replicated."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import karat

BESIDE = "g3b,residual=softmax"


def with_gates_at_zero(model: nn.Module) -> None:
    for operator in karat.karat_operators(model).values():
        operator.gate.data.zero_()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Support for mismatched")
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("watched", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_encoder_with_padding_is_the_original_in_every_mode(watched: Any, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)
    like, x = copy.deepcopy(encoder), torch.randn(3, 7, 16)
    karat.karatize(encoder, BESIDE, example=x)
    with_gates_at_zero(encoder)
    padded = torch.arange(7) >= torch.tensor([[5], [2], [7]])
    mask = padded if kind == torch.bool else torch.zeros(3, 7).masked_fill(padded, -torch.inf)
    for training in (True, False):
        encoder.train(training)
        like.train(training)
        with watched():
            out, expected = (each(x, src_key_padding_mask=mask) for each in (encoder, like))
        torch.testing.assert_close(out[~padded], expected[~padded], atol=1e-5, rtol=0)


@pytest.mark.parametrize("of_example", [True, False])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"kdim": 8, "vdim": 6}, {"add_bias_kv": True}])
def test_weights_are_given_whether_or_not_the_example_asked(settings: dict[str, Any], of_example: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, **settings)
    like = copy.deepcopy(layer)
    inputs = [torch.randn(7, 3, settings.get(name, 16)) for name in ("embed", "kdim", "vdim")]
    if settings.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    names = ("query", "key", "value")
    karat.karatize(layer, BESIDE, example=dict(zip(names, inputs, strict=True)) | {"need_weights": of_example})
    with_gates_at_zero(layer)
    for asked in (True, False):
        out, expected = (each(*inputs, need_weights=asked) for each in (layer, like))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


class Inner(nn.Module):
    """Self-attention of some heads; x (B,N,16)."""

    def __init__(self, heads: int, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.num_heads, self.inside, self.to_all = heads, inside, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.inside is None else self.inside(x)
        q, k, v = self.to_all(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("blocks", "there"), [("(0,)", ["inside.operator"]), ("(1,)", ["operator"])])
def test_one_inside_another_keeps_its_calls_to_itself(blocks: str, there: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Inner(2, Inner(4)), torch.randn(3, 6, 16)
    like = copy.deepcopy(model)
    karat.karatize(model, f"{BESIDE},blocks={blocks}", example=x)
    assert list(karat.karat_operators(model)) == there
    with_gates_at_zero(model)
    torch.testing.assert_close(model(x), like(x), atol=1e-5, rtol=0)
    with karat.record(model) as seen:
        model(x)
    assert [one.attention.shape[1] for one in seen.values()] == [4, 2]


def test_a_replica_computes_with_its_own_weights() -> None:
    model, x = Inner(2), torch.randn(3, 6, 16)
    karat.karatize(model, "g3b", example=x)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    expected = model(x)
    replica = model._replicate_for_data_parallel()
    replica.to_all = nn.Linear(16, 48)  # as nn.parallel.replicate puts another device's there
    assert not torch.equal(replica(x), expected)
    assert torch.equal(model(x), expected)


class Mixer(nn.Module):
    """One head, softmax written out, in a class that isn't called attention; a mask may be added. x (B,N,8)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, added: Tensor | None = None, inplace: bool = False) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1)
        if inplace and added is not None:
            scores.add_(added)
        elif added is not None:
            scores = scores + added
        return torch.softmax(scores, -1) @ v


def test_projections_of_queries_tell_attention_by_another_name() -> None:
    model, x = Mixer(), torch.randn(2, 5, 8)
    karat.karatize(model, "g3b", example=x)
    with karat.record(model) as seen:
        out = model(x)
    torch.testing.assert_close(out, (seen[""].attention @ model.to_qkv(x).chunk(3, -1)[2].unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (1, 5), (2, 1, 5)])
def test_an_added_mask_is_one_however_high_the_scores(shape: tuple[int, ...], inplace: bool) -> None:
    model, x = Mixer(), 30 * torch.randn(2, 5, 8)
    karat.karatize(model, "g3b", example=x)
    added = torch.zeros(shape)
    added[..., 3:] = -100
    with karat.record(model) as seen:
        model(x, added, inplace)
    sigma = seen[""].attention
    assert not sigma[..., 3:].any()
    assert sigma[..., :3].any()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, added, inplace), model(x, added, inplace))
    torch._dynamo.reset()
