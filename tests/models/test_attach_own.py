"""Models that people write themselves: what an axis is, what softmax is for, and what would go unseen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import karat

B, N, C, H = 2, 6, 16, 4


def tokens(batch: int = B) -> Tensor:
    return torch.randn(batch, N, C, generator=torch.Generator().manual_seed(batch))


class Own(nn.Module):
    """Self-attention whose way to its scores is a method: `core` of q, k, v (B,H,N,D)."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.checkpointed = H, checkpointed
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def heads(self, x: Tensor) -> Any:
        return self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = checkpoint(self.core, q, k, v, use_reentrant=True) if self.checkpointed else self.core(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Folded(Own):
    """Images and heads in one axis, either of them the outer one; fused, or softmax written out."""

    order = (0, 1)
    fused = False

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(*self.order, 2, 3).flatten(0, 1) for x in (q, k, v))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2).softmax(-1), v)
        images = len(out) // H
        return out.unflatten(0, (images, H) if self.order == (0, 1) else (H, images)).permute(*self.order, 2, 3)


def by_definition(model: Any, x: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    out = model.operator(q @ k.transpose(-2, -1) / 2, None) @ v
    return model.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("example", [tokens(), torch.zeros(B, N, C), tokens(4)])
def test_heads_are_found_in_an_axis_of_images_and_heads(order: Any, fused: bool, example: Tensor) -> None:
    model = Folded()
    model.order, model.fused = order, fused
    karat.karatize(model, "g3b", example=example)
    x = tokens(3)
    torch.testing.assert_close(model(x), by_definition(model, x))


def test_an_axis_that_is_neither_images_nor_heads_is_refused() -> None:
    class TokensFirst(Own):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.reshape(len(x), -1, C // H).transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
            return ((q @ k.transpose(1, 2) / 2).softmax(-1) @ v).transpose(0, 1).reshape(x.shape)

    with pytest.raises(ValueError, match=r"the first axis of queries or scores .* isn't the example's inputs"):
        karat.karatize(TokensFirst(), "g3b", example=torch.randn(8, 2, C))


def test_one_head_of_one_input_at_a_time_is_refused() -> None:
    class Single(Own):
        def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.stack(
                [torch.stack([F.scaled_dot_product_attention(*one) for one in zip(*of, strict=True)])
                 for of in zip(q, k, v, strict=True)]
            )  # fmt: skip

    with pytest.raises(ValueError, match="are of one input and one head"):
        karat.karatize(Single(), "g3b", example=tokens())


def test_queries_that_all_images_share_have_the_operator() -> None:
    class Learned(Own):
        def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q[:1], k, v)

    model = Learned()
    karat.karatize(model, "g3b", example=tokens())
    q, k, v = model.heads(tokens())
    out = (model.operator(q[:1] @ k.transpose(-2, -1) / 2, None) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model(tokens()), model.proj(out))


class Router(nn.Module):
    """Attention, and softmax that weighs no values: a router's, and in the end a classifier's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.attn, self.gate, self.head = Own(), nn.Linear(C, 3), nn.Linear(C, 20)
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x + self.attn(x), self.gate(x).softmax(-1)
        x = torch.stack([gate[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)
        return self.head(x).softmax(-1)


def test_softmax_that_weighs_no_values_stays() -> None:
    model = Router()
    with pytest.warns(UserWarning, match=r"the model \(Router\): no product of matrices weighs values by its softmax"):
        karat.karatize(model, "g3b", example=tokens())
    assert list(karat.karat_operators(model)) == ["attn.operator"]
    torch.testing.assert_close(model(tokens()).sum(-1), torch.ones(B, N))


@pytest.mark.parametrize("change", [lambda a: F.dropout(a, 0.1, False), lambda a: a.half().float(), Tensor.clone])
def test_softmax_is_followed_to_its_values(change: Any) -> None:
    class Written(Own):
        def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.einsum("bhmd,bhnd->bhmn", q, k) / 2
            return torch.einsum("bhmn,bhnd->bhmd", change(F.softmax(input=scores, dim=-1)), v)

    model = Written()
    karat.karatize(model, "g3b", example=tokens())
    torch.testing.assert_close(model(tokens()), by_definition(model, tokens()), atol=1e-3, rtol=1e-3)


def test_attention_that_the_example_misses_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Own(), Own()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.warns(UserWarning, match=r"stays softmax: b \(Own\): the example doesn't call it"):
        karat.karatize(Two(), "g3b", example=tokens())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_that_would_forget_the_operator_is_refused() -> None:
    model = karat.karatize(Own(checkpointed=True), "g3b", example=tokens())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), by_definition(model, tokens()))
    with pytest.raises(ValueError, match="Own checkpoints its own call for attention"):
        model(tokens())


def test_a_checkpoint_around_the_module_learns_as_without() -> None:
    model = karat.karatize(Own(), "g3b", example=tokens())
    x = tokens().requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    checkpoint(model, x, use_reentrant=True).square().sum().backward()
    for given, expected in zip((x, *model.parameters()), plain, strict=True):
        torch.testing.assert_close(given.grad, expected)


def test_what_is_found_whole_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        karat.karatize(nn.Sequential(Own(), Folded()), "g3b", example=tokens())
