"""Conversion of models: names, sharing, subsets, hybrids, saving, training, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Attention
from timm.optim import create_optimizer_v2
from torch import nn

import karat
from karat.models.attention import KArAtAttention
from karat.models.backbones import attention_sites, backbone_of
from support.small_models import BACKBONES, SMALL, VIT, images, small_model


def converted_indices(model: nn.Module) -> list[int]:
    return [i for i, site in enumerate(attention_sites(model)) if site.kind.learned]


@pytest.mark.parametrize("name", SMALL)
def test_every_attention_is_converted_and_tokens_are_counted(name: str) -> None:
    _, _, tokens, count = SMALL[name]
    model = small_model(name, "g3b").eval()
    operators = karat.karat_operators(model)
    assert len(operators) == count
    assert {op.num_tokens for op in operators.values()} == {tokens}
    assert torch.isfinite(model(images(name))).all()


@pytest.mark.parametrize("name", [name for name in SMALL if name != "swin"])  # timm's can't itself
@pytest.mark.parametrize("attention", ["g3b", "g3b,residual=softmax"])
def test_a_batch_may_be_empty(name: str, attention: str) -> None:
    model = small_model(name, attention).train()
    out = model(images(name, batch=0))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_all_other_weights_keep_names_and_values(name: str) -> None:
    model = small_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = karat.karatize(model, "g3b").state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(".attn.operator." in key for key in set(after) - set(before))


def test_names_in_the_state_dict() -> None:
    keys = small_model("vit", "g3b").state_dict().keys()
    assert {"blocks.1.attn.qkv.weight", "blocks.1.attn.operator.layers.0.coefficients"} <= set(keys)
    universal = small_model("vit", "g3u").state_dict().keys()
    assert {key for key in universal if "operator" in key} == {
        *("karat_operator.W", "karat_operator.W_factor"),
        *("karat_operator.layers.0.coefficients", "karat_operator.layers.0.factor"),
    }


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("attention", ["g3b", "dog-b,residual=softmax", "g1u,edge_scales=True"])
def test_one_batch_is_learned(name: str, attention: str) -> None:
    known = backbone_of(small_model(name, "softmax"))
    assert known is not None
    if not known.universal:
        attention = attention.replace("g1u", "g1b")
    model = small_model(name, attention).train()
    x, labels = images(name, batch=8), torch.arange(8) % 4
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    gradients = [p.grad for op in karat.karat_operators(model).values() for p in op.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize(("name", "attention"), [*((name, "g3b") for name in SMALL), ("vit", "g3u"), ("convit", "g2u")])
def test_a_saved_model_comes_back_bit_equal(name: str, attention: str, tmp_path: Path) -> None:
    model, x = small_model(name, attention).eval(), images(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    loaded = small_model(name, attention).eval()
    assert not torch.equal(loaded(x), model(x))
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(loaded(x), model(x))


# Sharing


def test_universal_sharing_has_one_operator() -> None:
    model = small_model("vit", "g3u")
    assert list(karat.karat_operators(model)) == ["karat_operator"]
    assert all(block.attn.operator is model.karat_operator for block in model.blocks)
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small_model("vit").parameters())
    assert parameters == 3 * 17 * 12 * (2 * 3 + 1)  # H·N·R·(2G+1): once, not once a block


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_shares_its_own_operator(duplicate: object) -> None:
    model = small_model("vit", "g3u").eval()
    twin = duplicate(model)
    assert twin.karat_operator is not model.karat_operator
    assert all(block.attn.operator is twin.karat_operator for block in twin.blocks)
    x = images("vit")
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.karat_operator.W.zero_()
    assert not torch.equal(twin(x), model(x))
    assert twin.no_weight_decay.model is twin


def test_moving_the_model_moves_the_shared_operator() -> None:
    model = small_model("vit", "g3u").double()
    assert model.blocks[0].attn.operator.W.dtype == torch.float64
    assert model(images("vit").double()).dtype == torch.float64


def test_a_shared_operator_is_trained_by_all_blocks() -> None:
    model, x = small_model("vit", "g3u"), images("vit")
    model(x).square().mean().backward()
    together = model.karat_operator.W.grad.clone()
    twin = small_model("vit", "g3b")
    state = model.state_dict()
    for i in range(2):
        for key in [key for key in state if key.startswith("karat_operator.")]:
            state[key.replace("karat_operator", f"blocks.{i}.attn.operator")] = state[key]
    twin.load_state_dict({key: value for key, value in state.items() if not key.startswith("karat_operator.")})
    twin(x).square().mean().backward()
    torch.testing.assert_close(together, sum(block.attn.operator.W.grad for block in twin.blocks))


def test_distributed_data_parallel_keeps_the_sharing(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = small_model("vit", "g3u"), images("vit")
        expected = model(x)
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(parallel(x), expected)
        parallel(x).sum().backward()
        assert parallel.module.karat_operator.W.grad is not None
        assert sum(key.endswith("karat_operator.W") for key in parallel.state_dict()) == 1
    finally:
        torch.distributed.destroy_process_group()


# Which blocks and heads


@pytest.mark.parametrize(("name", "blocks"), [("vit", (1,)), ("convit", (3,)), ("swin", (0, 2, 3))])
def test_a_subset_of_blocks(name: str, blocks: tuple[int, ...]) -> None:
    model = small_model(name, f"g3b,blocks={blocks}").eval()
    assert converted_indices(model) == list(blocks)
    assert torch.isfinite(model(images(name))).all()


def test_convit_converts_its_ungated_blocks_only() -> None:
    assert converted_indices(small_model("convit", "g3b")) == [2, 3]
    assert converted_indices(small_model("convit", "g3u")) == [2, 3]


@pytest.mark.parametrize("blocks", [(2,), (0, 99)])
def test_blocks_out_of_range(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no block .*; the model has blocks 0 to 1"):
        small_model("vit", f"g3b,blocks={blocks}")


def test_gated_blocks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is gated.*2, 3"):
        small_model("convit", "g3b,blocks=(1,)")


@pytest.mark.parametrize("name", BACKBONES)
def test_hybrid_heads(name: str) -> None:
    model = small_model(name, "g3b,softmax_heads=1").double().eval()
    with karat.record(model) as intermediates:
        assert torch.isfinite(model(images(name).double())).all()
    sums = torch.cat([i.attention.sum(-1)[:, -1].flatten() for i in intermediates.values()])
    torch.testing.assert_close(sums, torch.ones_like(sums))  # the last head is softmax everywhere


def test_softmax_heads_that_leave_none() -> None:
    with pytest.raises(ValueError, match="softmax_heads"):
        small_model("vit", "g3b,softmax_heads=3")


# Settings of the model that is converted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_and_mode_are_followed(dtype: torch.dtype) -> None:
    model = small_model("vit").to(dtype).eval()
    karat.karatize(model, "g3b")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    assert model(images("vit").to(dtype)).dtype == dtype


def test_the_meta_device_is_followed() -> None:
    with torch.device("meta"):
        model = small_model("vit", "g3b")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("attention", ["g3b", "g3u"])
def test_autocast_and_checkpointing(attention: str) -> None:
    model, x = small_model("vit", attention), images("vit")
    model.set_grad_checkpointing(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(p.grad is not None for op in karat.karat_operators(model).values() for p in op.parameters())


class Float32Norm(nn.LayerNorm):
    """A norm that autocast runs in float32, as it does on CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("attention", ["g3b", "g3b,residual=softmax", "g3b,residual=softmax,softmax_heads=1"])
def test_norms_of_queries_and_keys_may_stay_in_float32_under_autocast(attention: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, qk_norm=True, norm_layer=Float32Norm)
    karat.karatize(model, attention).eval()
    x = images("vit")
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
    torch.testing.assert_close(out.float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_parallel_blocks_are_converted_too() -> None:
    block = timm.models.vision_transformer.ParallelThingsBlock
    model = timm.create_model("vit_tiny_patch16_224", **VIT, block_fn=block)
    karat.karatize(model, "g3b")
    assert len(karat.karat_operators(model)) == 4
    assert torch.isfinite(model(images("vit"))).all()


@pytest.mark.parametrize(("name", "attention"), [("vit", "g3b,residual=softmax"), ("vit", "g3u"), ("swin", "g3b")])
def test_timm_optimizers_leave_operators_undecayed(name: str, attention: str) -> None:
    model = small_model(name, attention)
    own = {id(p) for op in karat.karat_operators(model).values() for p in op.parameters()}
    assert own
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert not own & decayed
    assert small_model(name).no_weight_decay() <= model.no_weight_decay()


# Refusals


def test_softmax_leaves_the_model_alone() -> None:
    model = small_model("vit")
    modules = list(model.modules())
    assert karat.karatize(model, "softmax") is model
    assert list(model.modules()) == modules


@pytest.mark.parametrize("attention", ["g3b", "softmax"])
def test_a_converted_model_is_not_converted_again(attention: str) -> None:
    with pytest.raises(ValueError, match=r"converted already \(blocks\.0\.attn"):
        karat.karatize(small_model("vit", "g3b"), attention)


def test_swin_refuses_universal_sharing() -> None:
    with pytest.raises(ValueError, match=r"universal.*blockwise"):
        small_model("swin", "g3u")


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = small_model("swin")
    with pytest.raises(ValueError, match="softmax_heads"):
        karat.karatize(model, "g3b,softmax_heads=2")  # the first stage has two heads
    assert not converted_indices(model)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet10t", {}, "ResNet has no attention that karat knows"),
        ("vit_tiny_patch16_224", {**VIT, "patch_drop_rate": 0.5}, "patch_drop_rate=0"),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, kwargs: dict[str, object], message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    with pytest.raises(ValueError, match=message):
        karat.karatize(model, "g3b")


def test_pruned_heads_are_refused_by_name() -> None:
    model = small_model("vit")
    model.blocks[1].attn = Attention(24, num_heads=2, attn_head_dim=8)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn \(Attention\).*pruned"):
        karat.karatize(model, "g3b")


def test_universal_sharing_needs_equal_heads() -> None:
    model = small_model("vit")
    model.blocks[1].attn = Attention(24, num_heads=2)
    with pytest.raises(ValueError, match=r"equal heads and tokens.*blocks\.1\.attn 2x17"):
        karat.karatize(model, "g3u")
    karat.karatize(model, "g3b")
    assert isinstance(model.blocks[1].attn, KArAtAttention)
