"""Token grids that change in use: timm's set_input_size and dynamic_img_size, against resampling by hand."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn

import karat
from karat.operator.grids import MOST_GRIDS, _views, on_grid
from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import TokenGrid, resample_operator
from support.paths import ROOT
from support.small_models import SMALL, small_model

OLD, NEW = TokenGrid(1, 4, 4), TokenGrid(1, 3, 6)
SPECS = ("g2b", "dog-b,rank=3,order=PhiPhi", "rational-b,rank=None,base=silu", "bspline(grid=3)-b,rank=3,order=PhiW")


def dynamic(attention: str = "g3b", **kwargs: object) -> nn.Module:
    return small_model("vit", attention, dynamic_img_size=True, **kwargs)


@pytest.mark.parametrize("attention", ["g3b", "g3u", "softmax"])
@pytest.mark.parametrize("name", [name for name in SMALL if hasattr(small_model(name), "set_input_size")])
def test_set_input_size_is_resample_tokens(name: str, attention: str) -> None:
    if name == "swin" and attention == "g3u":
        pytest.skip("Swin is blockwise only")
    model = small_model(name, attention).eval()
    size = 2 * SMALL[name][1]["img_size"]
    expected = karat.resample_tokens(copy.deepcopy(model), img_size=size)
    with pytest.warns() if name == "swin" and attention == "softmax" else torch.no_grad():
        model.set_input_size(img_size=(size, size))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    x = torch.randn(1, 3, size, size)
    assert torch.equal(model(x), expected(x))


def test_a_copied_model_resizes_itself() -> None:
    model = small_model("vit", "g3b")
    twin = copy.deepcopy(model)
    twin.set_input_size(img_size=(32, 32))
    assert {op.num_tokens for op in karat.karat_operators(twin).values()} == {65}
    assert {op.num_tokens for op in karat.karat_operators(model).values()} == {17}


def test_another_patch_size_carries_the_operators_too() -> None:
    model = small_model("vit", "g3b").eval()
    model.set_input_size(patch_size=(2, 2))
    assert {op.num_tokens for op in karat.karat_operators(model).values()} == {65}
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16))).all()


def test_set_input_size_refuses_before_it_changes_anything() -> None:
    model = small_model("vit", "g3b")
    resample_operator(model.blocks[1].attn.operator, (4, 4), (2, 2), 1)
    with pytest.raises(ValueError, match="has 5 tokens"):
        model.set_input_size(img_size=(32, 32))
    assert model.patch_embed.grid_size == (4, 4)


def test_built_at_another_size() -> None:
    model = karat.create_model("vit_tiny_patch16_224", "g1u", img_size=384, depth=1, num_classes=3)
    assert model.karat_operator.num_tokens == 577


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_is_what_resampling_makes(spec: str) -> None:
    op = KArAtOperator(2, 17, spec)
    made = resample_operator(copy.deepcopy(op), (4, 4), (3, 6), 1)
    q, k, v = torch.randn(3, 2, 2, 19, 4).unbind()
    with torch.no_grad():
        view = on_grid(op, OLD, NEW)
        assert torch.equal(view.attend(q, k, v), made.attend(q, k, v))
        assert torch.equal(view(q @ k.mT), made(q @ k.mT))
    assert op.num_tokens == 17
    assert [p.shape for p in op.parameters()] == [p.shape for p in KArAtOperator(2, 17, spec).parameters()]
    assert on_grid(op, OLD, OLD) is op


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_the_stored_parameters(spec: str) -> None:
    op = KArAtOperator(1, 17, spec).double()
    scores = torch.randn(1, 1, 2, 19, dtype=torch.float64)
    names = [name for name, p in op.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in op.parameters() if p.requires_grad]
    rows = torch.randn(1, 1, 2, 19, dtype=torch.float64)

    def output(*numbers: torch.Tensor) -> torch.Tensor:
        twin = copy.copy(op)
        for name, number in zip(names, numbers, strict=True):
            owner = op.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = number
        return (on_grid(twin, OLD, NEW)(scores) * rows).sum()

    assert torch.autograd.gradcheck(output, values, fast_mode=True)


@pytest.mark.parametrize("attention", ["g3b", "g3u", "morlet-b,rank=None", "g2b,residual=softmax"])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (8, 20)])
def test_dynamic_images_see_resampled_operators(attention: str, size: tuple[int, int]) -> None:
    model = dynamic(attention).eval()
    expected = karat.resample_tokens(copy.deepcopy(model), img_size=size)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    torch.testing.assert_close(model(x), expected(x))  # with a graph
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model(x).square().sum().backward()
    parameters = dict(model.named_parameters())
    learned = [name for name in names if "operator" in name and "gate" not in name]
    if "residual" not in attention:  # its gate is zero at the start
        assert all(parameters[name].grad.abs().sum() > 0 for name in learned)


def test_views_are_kept_until_a_parameter_changes() -> None:
    model = dynamic().eval()
    op, x = model.blocks[0].attn.operator, torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        before = model(x)
        (view,) = _views[op].values()
        assert torch.equal(model(x), before)
        assert next(iter(_views[op].values())) is view
        model(torch.randn(1, 3, 16, 24))
        assert len(_views[op]) == 2
        op.W.mul_(2)  # as an optimiser does
        changed = model(x)
        assert not torch.equal(changed, before)
        assert len(_views[op]) == 1
        model.load_state_dict({key: 0 * value for key, value in model.state_dict().items()})
        assert (model(x) == 0).all()
        model.double()
        assert model(x.double()).dtype == torch.float64
    with torch.inference_mode():
        model(x.double())
    model.train()
    model(x.double()).sum().backward()
    assert op.W.grad is not None


def test_no_more_views_than_a_bound() -> None:
    op = KArAtOperator(1, 17, "g1b,rank=2")
    with torch.no_grad():
        for width in range(1, MOST_GRIDS + 10):
            on_grid(op, OLD, TokenGrid(1, 2, width))
    assert len(_views[op]) == MOST_GRIDS


def test_recording_sees_the_grid_at_hand() -> None:
    model = dynamic().eval()
    with karat.record(model) as seen, torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    assert seen["blocks.1.attn"].attention.shape == (1, 3, 37, 37)


def test_dynamic_models_are_copied_resized_and_saved() -> None:
    model = dynamic().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 32))
        expected = model(x)
        assert torch.equal(twin(x), expected)  # its own watch, not the other's
        twin.set_input_size(img_size=(24, 24))
        assert torch.equal(twin(x), expected)
    assert set(model.state_dict()) == set(small_model("vit", "g3b").state_dict())


def test_padded_tokens_reach_nothing() -> None:
    """timm's attn_mask path: what lies at masked keys doesn't matter to the other tokens."""
    for attention in ("g3b", "g2b,rank=3,order=PhiW", "dog-b,rank=None", "g2b,softmax_heads=1"):
        model = small_model("vit", attention).eval()
        keep = torch.ones(2, 1, 1, 17, dtype=torch.bool)
        keep[0, ..., 12:], keep[1, ..., 5:] = False, False
        x = torch.randn(2, 3, 16, 16)
        noise = x.clone()
        noise[0, :, 12:, 4 * 3 :], noise[1, :, 8:] = torch.randn(3, 4, 4), torch.randn(3, 8, 16)
        with torch.no_grad():
            first, second = (model.forward_features(images, attn_mask=keep) for images in (x, noise))
        assert torch.equal(first[0, :12], second[0, :12])
        assert torch.equal(first[1, :5], second[1, :5])
        assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("page", ["tokens.md", "convert.md"])
def test_the_examples_of_the_guide(page: str) -> None:
    path = ROOT / "docs" / page
    failures, tried = doctest.testfile(str(path), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert tried > 3
    assert failures == 0


def test_checkpointed_blocks_are_recomputed_on_their_own_grid() -> None:
    """Two sizes in flight at once: the backward pass of the first comes after the second has passed."""
    model = dynamic("g2b,rank=3").train()
    sizes = [(16, 16), (24, 16)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        loss = sum(model(x).square().sum() for x in images)
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        model(torch.randn(1, 3, 16, 24))
