"""Attention over sequences: lengths, masks and other sequences, against the operator on what is really there."""

from __future__ import annotations

import pytest
import torch

import karat

SPECS = ("g2b", "dog-b,rank=None", "g2b,rank=3,order=PhiW", "rational-b,rank=3,order=PhiPhi", "g1b,residual=softmax")


@pytest.mark.parametrize("spec", SPECS)
def test_padding_changes_nothing(spec: str) -> None:
    layer = karat.SequenceAttention(12, 3, 10, spec).double()
    x = torch.randn(3, 10, 12, dtype=torch.float64)
    lengths = torch.tensor([10, 4, 1])
    out = layer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(layer(x[row : row + 1, :length])[0], out[row, :length])
    keys = torch.arange(10) < lengths[:, None]
    assert torch.equal(layer(x, mask=keys), out)
    assert torch.equal(layer(x, lengths, keys[:, None, None]), out)


@pytest.mark.parametrize("spec", SPECS)
def test_cross_attention_is_the_operator_on_other_keys(spec: str) -> None:
    layer = karat.CrossAttention(12, 3, 10, spec, context_dim=7).double()
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 10, 7, dtype=torch.float64)
    q = layer.q(x).unflatten(-1, (3, 4)).transpose(1, 2)
    k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in layer.kv(context).chunk(2, -1))
    sigma = layer.operator(q @ k.mT / 2)
    assert sigma.shape == (2, 3, 4, 10)
    torch.testing.assert_close(layer(x, context), layer.proj((sigma @ v).transpose(1, 2).flatten(2)))
    lengths = torch.tensor([6, 6])
    torch.testing.assert_close(layer(x, context, lengths), layer(x, context[:, :6]))
    layer(x, context, lengths).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_stretched_operator_serves_longer_sequences() -> None:
    layer = karat.SequenceAttention(8, 2, 10, "g1b")
    karat.resample_operator(layer.operator, 10, 25)
    assert layer(torch.randn(1, 25, 8)).shape == (1, 25, 8)


def test_causal_masks() -> None:
    layer = karat.SequenceAttention(8, 2, 6, "g1b").double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    out = layer(x, mask=causal[None, None])
    x2 = x.clone()
    x2[:, 4:] += 1
    assert torch.equal(layer(x2, mask=causal[None, None])[:, :4], out[:, :4])


def test_dropout_acts_in_training_only() -> None:
    layer = karat.SequenceAttention(8, 2, 6, "g1b", attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def masked(*shape: int) -> torch.Tensor:
    return karat.SequenceAttention(9, 3, 5)(torch.zeros(2, 4, 9), mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karat.SequenceAttention(10, 3, 4), "multiple of num_heads"),
        (lambda: karat.SequenceAttention(9, 3, 4, "softmax"), "MultiheadAttention"),
        (lambda: karat.SequenceAttention(9, 3, 4)(torch.zeros(1, 5, 9)), "more than the operator's 4 tokens"),
        (lambda: karat.SequenceAttention(9, 3, 4)(torch.zeros(1, 4, 9), torch.tensor([[2]])), "lengths must be"),
        (lambda: karat.SequenceAttention(9, 3, 4)(torch.zeros(1, 4, 9), torch.tensor([0.5])), "in whole numbers, got"),
        (lambda: karat.SequenceAttention(9, 3, 4)(torch.zeros(1, 4, 9), mask=torch.zeros(1, 4)), "must be boolean"),
        (lambda: karat.CrossAttention(9, 0, 4), "num_heads=0"),
        (lambda: masked(4, 4), r"write mask\[None, None\]"),
        (lambda: masked(1, 4), r"one of keys, \(2, 4\)"),
        (lambda: masked(2, 4, 4), r"write mask\[:, None\]"),
        (lambda: masked(4), "two axes"),
        (lambda: masked(2, 1, 1, 3), r"must broadcast to \(2, 3, 4, 4\)"),
    ],
)
def test_what_does_not_fit(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
