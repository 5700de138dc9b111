"""The trunk: its attention is the operator's by definition, its padding is absent, its other sizes are resampled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from karat.detect.attention import GridAttention, with_positions
from karat.detect.pyramid import LEVELS, SimpleFeaturePyramid
from karat.detect.trunk import Trunk, create_trunk, global_blocks
from karat.models.attention import KArAtAttention
from karat.models.karatize import karat_operators
from karat.operator.grids import on_grid
from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import TokenGrid, resample_operator
from karat.ops.masks import safe_softmax, softmax_attention

ATTENTIONS = ["softmax", "g2b,rank=3", "g2u,rank=3", "g1b,rank=3,order=PhiW", "g1u,residual=softmax", "dog-u,rank=2"]
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def small(attention: str, img_size: int = 32, window: int = 4, **more: Any) -> Trunk:
    """Three blocks, windows of 4x4 tokens, the last block sees everything; weights large enough to matter."""
    trunk = create_trunk(
        "vit_tiny_patch16_224", attention, img_size=img_size, window=window, whole=(2,), **SMALL, **more
    )
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
            if "qkv.weight" in name:
                parameter.mul_(8)
    return trunk.double().eval()


def sigma(attn: Any, scores: Tensor, mask: Tensor | None) -> Tensor:
    """The attention map by definition: from scores (B,H,M,N), with the operator carried to the grid by other means."""
    if attn.operator is None:
        return scores.softmax(-1) if mask is None else scores.masked_fill(~mask, -torch.inf).softmax(-1)
    old, new = (tuple(grid[1:]) for grid in attn.grids)
    return resample_operator(deepcopy(attn.operator), old, new)(scores, mask)


def by_hand(trunk: Trunk, images: Tensor) -> Tensor:
    """The trunk's forward written out with loops over windows, for images without padding."""
    vit, w = trunk.vit, trunk.window
    x = vit.patch_embed(images) + vit.pos_embed
    side = trunk.img_size // trunk.stride
    x = x.reshape(len(images), side, side, -1)

    def attend(attn: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        B, N, C = tokens.shape
        q, k, v = attn.qkv(tokens).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return attn.proj((sigma(attn, scores, mask) @ v).transpose(1, 2).reshape(B, N, C))

    for index, block in enumerate(vit.blocks):
        y = block.norm1(x)
        out = torch.zeros_like(y)
        step = side if index in trunk.global_blocks else w
        for top in range(0, side, step):
            for left in range(0, side, step):
                part = y[:, top : top + step, left : left + step]
                h, width = part.shape[1:3]
                cells, mask = part.reshape(len(images), h * width, -1), None
                if (h, width) != (step, step):  # a window over the edge: fill it, mask what was filled
                    filled = y.new_zeros(len(images), step, step, y.shape[-1])
                    filled[:, :h, :width] = part
                    inside = torch.zeros(step, step, dtype=torch.bool)
                    inside[:h, :width] = True
                    cells, mask = filled.flatten(1, 2), inside.flatten()[None, None, None]
                seen = attend(block.attn, cells, mask).reshape(len(images), step, step, -1)
                out[:, top : top + step, left : left + step] = seen[:, :h, :width]
        x = x + out
        x = x + block.mlp(block.norm2(x))
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("img_size", [32, 48, 64])  # one window; windows over the edge; four windows
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_forward_is_the_operator_applied_by_hand(attention: str, img_size: int) -> None:
    trunk = small(attention, img_size)
    images = torch.randn(2, 3, img_size, img_size, dtype=torch.float64)
    assert torch.allclose(trunk(images), by_hand(trunk, images), atol=1e-9)


@pytest.mark.parametrize("attention", ["g3b", "g3u", "softmax"])
@torch.no_grad()
def test_at_224_every_attention_has_196_keys_and_is_the_operator_by_hand(attention: str) -> None:
    trunk = create_trunk("vit_tiny_patch16_224", attention, img_size=224).double().eval()
    operators = karat_operators(trunk.vit)
    assert {op.num_tokens for op in operators.values()} <= {196}
    assert len(operators) == {"g3b": 12, "g3u": 1, "softmax": 0}[attention]
    assert trunk.global_blocks == {2, 5, 8, 11}
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    assert torch.allclose(trunk(images), by_hand(trunk, images), atol=1e-9)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_what_lies_in_the_padding_has_no_influence(attention: str) -> None:
    trunk = small(attention, 64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    sizes = [(40, 64), (64, 20)]
    changed = images.clone()
    changed[0, :, 40:], changed[1, :, :, 24:] = 100.0, -50.0
    first, second = trunk(images, sizes), trunk(changed, sizes)
    assert torch.isfinite(first).all()
    assert torch.allclose(first[0, :, :5], second[0, :, :5], atol=1e-9)
    assert torch.allclose(first[1, :, :, :3], second[1, :, :, :3], atol=1e-9)
    assert not torch.allclose(trunk(images)[0, :, :5], first[0, :, :5], atol=1e-3)


@pytest.mark.parametrize("attention", ["softmax", "g1b,rank=3", "g1u,rank=3", "g1b,rank=3,order=PhiW"])
def test_relative_positions_are_the_sum_of_two_tables(attention: str) -> None:
    trunk = small(attention, 32, relative=True)
    attn: Any = trunk.vit.blocks[2].attn
    table_h, table_w = (torch.randn(7, 8, dtype=torch.float64) for _ in range(2))
    q, k = torch.randn(2, 2, 2, 16, 8, dtype=torch.float64).unbind()
    long_q, long_k = with_positions(q, k, 0.3, table_h, table_w)
    expected = 0.3 * q @ k.transpose(-2, -1)
    for i in range(16):
        for j in range(16):
            expected[:, :, i, j] += q[:, :, i] @ (table_h[i // 4 - j // 4 + 3] + table_w[i % 4 - j % 4 + 3])
    assert torch.allclose(long_q @ long_k.transpose(-2, -1), expected)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = trunk(images)
    with torch.no_grad():
        attn.rel_pos_h.copy_(table_h)
    after = trunk(images)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert attn.rel_pos_h.grad.abs().sum() > 0


def test_a_shared_operator_learns_from_the_grid_it_is_resampled_to() -> None:
    trunk = small("g1u,rank=3", 64)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for index in (0, 1):  # only the global block's use of it is left
        nn.init.zeros_(trunk.vit.blocks[index].attn.proj.weight)
    trunk(images).pow(2).sum().backward()
    (op,) = karat_operators(trunk.vit).values()
    assert op.num_tokens == 16
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in op.parameters())
    names = [name for name, _ in trunk.named_parameters()]
    assert sum("coefficients" in name for name in names) == 1


@pytest.mark.parametrize("attention", ["g2b,rank=3", "dog-b,rank=2", "g1b,base=silu", "g1b,rank=None"])
def test_resampling_is_linear_and_its_gradient_exact(attention: str) -> None:
    op = small(attention, 32).vit.blocks[0].attn.operator
    old, new = TokenGrid(0, 4, 4), TokenGrid(0, 6, 5)
    tensors = dict(on_grid(op, old, new).named_parameters())
    first = next(name for name in tensors if tensors[name].requires_grad)
    weight = torch.randn_like(tensors[first])
    (gradient,) = torch.autograd.grad((tensors[first] * weight).sum(), [op.get_parameter(first)])
    direction = torch.randn_like(gradient)
    with torch.no_grad():
        op.get_parameter(first).add_(direction)
        moved = dict(on_grid(op, old, new).named_parameters())[first]
    change = ((moved - tensors[first].detach()) * weight).sum()
    assert change.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-9)


@pytest.mark.parametrize("width", [8, 64])
def test_masked_keys_of_softmax_without_memory_of_the_square(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, 40, size, requires_grad=True) for size in (width, width, 5))
    mask = torch.rand(2, 1, 1, 40) > 0.4
    mask[1] = False  # no key at all
    results = []
    for limit in (10_000, 1):
        monkeypatch.setattr("karat.ops.masks.LINEAR_FROM", limit)
        out = softmax_attention(q, k, v, 0.3, None, mask)
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), [q, k, v])])
    for left, right in zip(*results, strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    assert not results[0][0][1].any()


def test_grad_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        trunk = small("g1u,rank=3", 64).train()
        trunk.set_grad_checkpointing(enable)
        trunk(torch.ones(1, 3, 64, 64, dtype=torch.float64), [(40, 64)]).pow(2).sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert torch.allclose(left, right)


def test_global_blocks_of_other_depths() -> None:
    assert global_blocks(12) == (2, 5, 8, 11)
    assert global_blocks(24) == (5, 11, 17, 23)
    for depth in range(1, 20):
        chosen = global_blocks(depth)
        assert chosen[-1] == depth - 1
        assert len(set(chosen)) == min(depth, 4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        small("softmax", 36)
    with pytest.raises(ValueError, match="no plain ViT"):
        create_trunk("swin_tiny_patch4_window7_224", "softmax")
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        create_trunk("vit_tiny_patch16_224", "softmax", whole=(7,), **SMALL)


class _AnyTrunk(nn.Module):
    num_features = 6

    def forward(self, images: Tensor, sizes: Any = None) -> Tensor:
        return images.mean(1, keepdim=True)[:, :, ::16, ::16].expand(-1, 6, -1, -1)


def test_the_pyramid_wraps_any_trunk() -> None:
    pyramid = SimpleFeaturePyramid(_AnyTrunk(), 8)
    maps = pyramid(torch.randn(2, 3, 224, 224))
    assert list(maps) == list(LEVELS)
    assert [tuple(x.shape) for x in maps.values()] == [(2, 8, side, side) for side in (56, 28, 14, 7, 4)]


def test_modules_keep_timms_names() -> None:
    names = set(small("g1b").state_dict())
    assert {"vit.blocks.0.attn.qkv.weight", "vit.blocks.2.attn.operator.W", "vit.pos_embed"} <= names
    assert isinstance(small("g1b").vit.blocks[0].attn, GridAttention)


@pytest.mark.parametrize("operator", [False, True])
def test_nothing_of_the_attention_taken_over_is_dropped(operator: bool) -> None:
    attn: Any = Attention(16, num_heads=2, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm, attn_drop=0.5)
    attn.fused_attn = False
    attn.norm.weight.data.normal_()
    attn.gate = nn.Linear(16, 16)
    if operator:
        attn = KArAtAttention(attn, KArAtOperator(2, 9, "g1b"))
    grid = GridAttention(attn.eval(), (3, 3), (3, 3))
    x, causal = torch.randn(2, 9, 16), torch.ones(9, 9, dtype=torch.bool).tril()
    by_operator = KArAtAttention(attn, attn.operator) if operator else None
    bias = torch.randn(9, 9)
    for arguments in ({}, {"is_causal": True}, {"attn_mask": causal}, {"attn_mask": bias}):
        q, k, v = attn.qkv(x).reshape(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 8**-0.5 + (bias if arguments.get("attn_mask") is bias else 0)
        mask = causal if arguments and arguments.get("attn_mask") is not bias else None
        weights = (
            by_operator.operator(scores, mask)
            if by_operator
            else safe_softmax(scores, None if mask is None else mask[None, None])
        )
        out = attn.norm((weights @ v).transpose(1, 2).flatten(2)) * attn.gate(x).sigmoid()
        torch.testing.assert_close(grid(x, **arguments), attn.proj(out))
    assert torch.equal(grid(x), grid(x))
    grid.train()
    assert not torch.equal(grid(x), grid(x))
