"""Operators in models that karat has no record of: found by an example, right against an independent computation."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import karat
from karat.models.attach.calls import Layout
from karat.models.attach.find import find


class Mine(nn.Module):
    """Somebody's own attention, in one of the ways to write it; x (B,N,C)."""

    def __init__(self, way: str, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.way, self.causal = 3, way, causal
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.passes += 1
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "fused":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, scale=0.3)
        elif self.way == "folded":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).unflatten(0, (B, 3))
        elif self.way == "five":
            q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)
        elif self.way == "grouped":
            out = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        elif self.way == "twice":
            out = F.scaled_dot_product_attention(q, k, v) - 0.5 * F.scaled_dot_product_attention(k, q, v)
        else:
            scores = q @ k.transpose(-2, -1) * 0.3
            scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
            out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Attention, a linear layer, attention."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if mask is None else layer(x, mask))
        return x.mean(1)


def mine(way: str) -> tuple[nn.Module, Tensor]:
    return Net(Mine(way), Mine(way)), torch.randn(2, 10, 24)


def timms(name: str, side: int, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    return timm.create_model(name, num_classes=4, **kwargs), torch.randn(2, 3, side, side)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 9, 24)


SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,), "drop_path_rate": 0.0}
MODELS: dict[str, tuple[Any, int]] = {  # kind of model -> how to make it with an input, operators
    **{way: ((lambda way=way: mine(way)), 2) for way in ("fused", "folded", "five", "grouped", "written")},
    "twice": (lambda: mine("twice"), 4),
    "encoder": (encoder, 2),
    "torchvision": (lambda: (VisionTransformer(16, 4, 2, 2, 16, 32), torch.randn(2, 3, 16, 16)), 2),
    "rotary": (lambda: timms("eva02_tiny_patch14_224", 56, img_size=56, **SMALL), 2),
    "beit": (lambda: timms("beit_base_patch16_224", 32, img_size=32, **SMALL), 2),
    "swin v2": (lambda: timms("swinv2_tiny_window8_256", 32, **SWIN), 2),
    "pooled keys": (lambda: timms("pvt_v2_b0", 32, depths=(1, 1, 1, 1)), 4),
}


def model_and_input(kind: str, attention: str = "g3b") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[kind][0]()
    return karat.karatize(model, attention, example=x).eval(), x


@pytest.mark.parametrize("kind", MODELS)
def test_operators_are_where_attention_is_called(kind: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[kind][0]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for _, module in model.named_modules()]
    state = torch.get_rng_state()
    found = find(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    karat.karatize(model, "g3b", example=x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("operator" in name for name in after.keys() - before.keys())
    assert [type(m) for name, m in model.named_modules() if "operator" not in name] == classes
    operators = karat.karat_operators(model)
    assert len(operators) == MODELS[kind][1]
    assert [op.num_tokens for op in operators.values()] == [keys for site in found for _, _, keys in site.served]
    model(x).sum().backward()
    assert all(p.grad is not None for op in operators.values() for p in op.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_beside_softmax_with_gates_at_zero_it_is_the_original(kind: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[kind][0]()
    model.eval()
    with torch.no_grad():
        original = model(x)
        karat.karatize(model, "g3b,residual=softmax", example=x)
        for op in karat.karat_operators(model).values():
            op.gate.zero_()
        torch.testing.assert_close(model(x), original, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_copied_compiled_and_recorded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    model, x = model_and_input(kind)
    with torch.no_grad():
        out = model(x)
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        fresh, _ = model_and_input(kind)
        for op in karat.karat_operators(fresh).values():
            op.reset_parameters()
        fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(fresh(x), out)
        assert torch.equal(copy.deepcopy(model)(x), out)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
        with karat.record(model) as seen:
            assert torch.equal(model(x), out)
        assert len(seen) == MODELS[kind][1]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), out, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()


SPECS = ["g3b", "g3b,order=PhiW", "g3b,residual=softmax,softmax_heads=1", "row-b,rank=None", "static-b"]


@pytest.mark.parametrize("way", ["fused", "folded", "five", "grouped", "written"])
@pytest.mark.parametrize("attention", SPECS)
def test_sigma_and_output_are_those_of_an_independent_computation(way: str, attention: str) -> None:
    torch.manual_seed(0)
    layer, x = Mine(way), torch.randn(2, 10, 24)
    karat.karatize(layer, attention, example=x).eval()
    with karat.record(layer) as seen, torch.no_grad():
        out = layer(x)
        q, k, v = layer.qkv(x).reshape(2, 10, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if way == "grouped":
            k, v = (part[:, :1].expand(2, 3, 10, 8) for part in (k, v))
        scale = 0.3 if way in ("fused", "written") else 8**-0.5
        if way == "five":
            q, k, v = (part.unflatten(2, (2, 5)).transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) * scale
        sigma = layer.operator(scores)
        mixed = sigma @ v
        if way == "five":
            mixed = mixed.unflatten(0, (2, 2)).transpose(1, 2).flatten(2, 3)
        torch.testing.assert_close(out, layer.proj(mixed.transpose(1, 2).flatten(2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[""].scores, scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[""].attention, sigma, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["fused", "written"])
def test_masked_keys_have_no_part(way: str) -> None:
    layer, x = Mine(way), torch.randn(2, 10, 24)
    karat.karatize(layer, "g3b", example=x).eval()
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[:, ..., 7:] = False
    other = x.clone()
    other[:, 7:] = torch.randn(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask)[:, :7], layer(other, mask)[:, :7], atol=1e-6, rtol=0)
    if way == "fused":
        added = torch.where(mask, 0.0, -1e4)
        torch.testing.assert_close(layer(x, added), layer(x, mask))


def test_causal_attention_looks_at_the_past() -> None:
    layer, x = Mine("fused", causal=True), torch.randn(2, 10, 24)
    karat.karatize(layer, "g3b", example=x).eval()
    other = x.clone()
    other[:, 6:] = 0
    torch.testing.assert_close(layer(x)[:, :6], layer(other)[:, :6], atol=1e-6, rtol=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_gives_the_weights_that_it_uses(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 10, 24)
    karat.karatize(layer, "g3b", example=(x, x, x)).eval()
    padded = torch.zeros(2, 10, dtype=torch.bool)
    padded[:, 8:] = True
    with torch.no_grad(), karat.record(layer) as seen:
        out, weights = layer(x, x, x, padded, need_weights=need_weights)
    sigma = seen[""].attention
    assert torch.equal(sigma[..., 8:], torch.zeros_like(sigma[..., 8:]))
    v = F.linear(x, *(part.chunk(3)[2] for part in (layer.in_proj_weight, layer.in_proj_bias)))
    mixed = (sigma @ v.unflatten(-1, (3, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.out_proj(mixed), atol=1e-5, rtol=0)
    if need_weights:
        torch.testing.assert_close(weights, sigma.mean(1), atol=1e-5, rtol=0)


def test_universal_sharing_and_blocks() -> None:
    torch.manual_seed(0)
    model, x = mine("fused")
    karat.karatize(model, "g3u", example=x)
    assert list(karat.karat_operators(model)) == ["karat_operator"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.karat_operator.W.zero_()
    assert not torch.equal(twin(x), model(x))
    model, x = mine("fused")
    karat.karatize(model, "g3b,blocks=(1,)", example=x)
    assert list(karat.karat_operators(model)) == ["layers.1.operator"]
    with karat.record(model) as seen:
        model(x)
    torch.testing.assert_close(seen["layers.0"].attention.sum(-1), torch.ones(2, 3, 10))
    with pytest.raises(ValueError, match="no block 2; the model has blocks 0 to 1"):
        karat.karatize(mine("fused")[0], "g3b,blocks=(2,)", example=x)
    model, x = MODELS["pooled keys"][0]()
    with pytest.raises(ValueError, match=r"equal heads and tokens.*stages"):
        karat.karatize(model, "g3u", example=x)


def test_training_learns_with_checkpointing_and_autocast() -> None:
    model, x = model_and_input("rotary")
    model.train().set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {"blocks.0.attn.operator.W", "pos_embed"} <= model.no_weight_decay()


def test_exported_it_is_the_same() -> None:
    model, x = model_and_input("rotary")
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


class Changing(nn.Module):
    """Attention whose keys grow from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Mine("fused")

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)[:, 0] + self.attn(x[:, :6])[:, 0]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Linear(3, 3), None, "doesn't say what its inputs are"),
        (nn.Linear(3, 3), torch.zeros(2, 3), "Linear has no attention that karat knows"),
        (nn.Linear(3, 3), torch.zeros(2, 4), r"Linear can't take the example \(2, 4\)"),
        (nn.Linear(3, 3), 7, "example must be a tensor"),
        (Changing(), torch.zeros(2, 10, 24), r"keys changes from call to call \(6, 10\)"),
        (nn.DataParallel(Mine("fused")), torch.zeros(2, 10, 24), "wrapped"),
        (torch.compile(Mine("fused")), torch.zeros(2, 10, 24), "wrapped"),
    ],
)
def test_what_cannot_be_served_is_one_line(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        karat.karatize(model, "g3b", example=example)
    assert "\n" not in str(error.value)
    assert not karat.karat_operators(model)


def test_what_stays_is_named_in_one_warning() -> None:
    model = Net(Mine("fused"), nn.Sequential(Changing(), nn.Unflatten(1, (1, 24))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        karat.karatize(model, "g3b", example=torch.zeros(2, 10, 24))
    assert len(caught) == 1
    assert "layers.1.0.attn (Mine): its number of keys changes" in str(caught[0].message)
    assert list(karat.karat_operators(model)) == ["layers.0.operator"]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(Layout(3), (2, 3)), (Layout(3, 2), (2, 4, 3)), (Layout(3, folded=True), (6,)), (Layout(3, folded=True), (6, 4)),
     (Layout(1, None), (2,)), (Layout(1, None), (2, 4)), (Layout(3, 0), (3, 2))],
)  # fmt: skip
def test_folded_and_unfolded_is_what_it_was(layout: Layout, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, 5, 7)
    folded = layout.fold(x)
    assert folded.shape[1] == layout.heads
    assert torch.equal(layout.unfold(folded, torch.Size(shape)), x)


def test_nested_tensors_are_refused_with_the_remedy() -> None:
    model = karat.karatize(nn.MultiheadAttention(24, 2, batch_first=True).eval(), "g3b", (torch.randn(2, 9, 24),) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        x = torch.nested.nested_tensor([torch.randn(9, 24), torch.randn(4, 24)])
    with pytest.raises(ValueError, match=r"pad nested tensors, x.to_padded_tensor\(0.0\), and mask"):
        model(x, x, x, need_weights=False)
