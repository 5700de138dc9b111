"""Operators and models on another token grid: identities, sums over keys, prefix tokens, real sizes."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import karat
from karat.basis import BASES
from karat.models.backbones import backbone_of
from karat.operator.layout import Axes
from karat.operator.operator import KArAtOperator
from karat.operator.token_grid import TokenGrid, resample_axis
from support.small_models import SMALL, images, small_model

SMALLER = {"fourier": "fourier(grid=2)", "bspline": "bspline(grid=3)"}
ORDERS = ("rank=None", "rank=3,order=WPhi", "rank=3,order=PhiW", "rank=3,order=PhiPhi")
EXTRAS = ("", ",base=silu", ",base=silu,edge_scales=True", ",edge_scales=True", ",residual=softmax")
OLD = (4, 5)
NEW = ((4, 5), (7, 9), (3, 4), (2, 8), (1, 1))


def constant_over_positions(op: KArAtOperator) -> KArAtOperator:
    """Every edge function and row of W the same at all tokens; what isn't a token axis keeps its differences."""
    with torch.no_grad():
        for layer, axes in zip(op.layers, op.layout.layers, strict=True):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
                flatten(parameter, axes)
        if op.W is not None:
            flatten(nn.init.normal_(op.W), op.layout.W)
        if op.gate is not None:
            nn.init.normal_(op.gate)
    return op


def flatten(parameter: torch.Tensor, axes: Axes) -> None:
    for dim, axis in zip((-2, -1), axes, strict=True):
        if axis.is_tokens:
            parameter.copy_(parameter.narrow(dim, 0, 1).expand_as(parameter).clone())


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", [SMALLER.get(name, name) for name in BASES])
def test_row_sums_survive_any_grid(basis: str, order: str, extra: str) -> None:
    """SPEC §9: constant scores, an operator constant over positions, no prefix tokens."""
    op = constant_over_positions(KArAtOperator(2, math.prod(OLD), f"{basis}-b,{order}{extra}").double())
    scores = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64)[None, None, :, None].expand(1, 2, 3, -1)
    expected = op(scores.expand(-1, -1, -1, math.prod(OLD))).sum(-1)
    grid = OLD
    for new in NEW:  # and from each to the next
        karat.resample_operator(op, grid, new)
        grid = new
        assert op.num_tokens == math.prod(new)
        torch.testing.assert_close(op(scores.expand(-1, -1, -1, math.prod(new))).sum(-1), expected)


@pytest.mark.parametrize("extra", ["", ",base=gelu", ",edge_scales=published"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", [SMALLER.get(name, name) for name in BASES])
def test_the_same_grid_is_the_identity(basis: str, order: str, extra: str) -> None:
    op = KArAtOperator(2, 1 + math.prod(OLD), f"{basis}-b,{order}{extra}")
    before = dict(op.named_parameters())
    values = {name: value.clone() for name, value in op.state_dict().items()}
    karat.resample_operator(op, OLD, OLD, old_prefix=1)
    assert all(parameter is before[name] for name, parameter in op.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in op.state_dict().items())


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", [SMALLER.get(name, name) for name in BASES])
def test_a_resampled_operator_has_the_shapes_of_a_fresh_one(basis: str, order: str, extra: str) -> None:
    spec = f"{basis}-b,{order}{extra}"
    op = karat.resample_operator(KArAtOperator(2, 21, spec), OLD, (3, 7), old_prefix=1, new_prefix=2)
    fresh = KArAtOperator(2, 23, spec)
    fresh.load_state_dict(op.state_dict())
    q, k, v = torch.randn(3, 1, 2, 23, 4).unbind()
    torch.testing.assert_close(fresh.attend(q, k, v), op.attend(q, k, v))
    trainable = {name: p.requires_grad for name, p in op.named_parameters()}
    assert trainable == {name: p.requires_grad for name, p in fresh.named_parameters()}


def test_published_scales_stay_without_gradient() -> None:
    op = karat.resample_operator(KArAtOperator(2, 16, "g1b,edge_scales=published"), (4, 4), (5, 5))
    assert not op.layers[0].base_scale.requires_grad
    assert op.layers[0].basis_scale.requires_grad


# One axis


def test_cells_are_interpolated_as_images_and_scaled() -> None:
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    for new, antialias in (((8, 10), False), ((2, 3), True), ((8, 3), True)):
        image = x.transpose(1, 2).reshape(2, 3, *OLD)
        expected = F.interpolate(image, new, mode="bicubic", antialias=antialias).flatten(2).transpose(1, 2)
        grids = TokenGrid(0, *OLD), TokenGrid(0, *new)
        torch.testing.assert_close(resample_axis(x, 1, *grids, amplitude=False), expected)
        scale = 20 / math.prod(new)
        torch.testing.assert_close(resample_axis(x, 1, *grids, amplitude=True), expected * scale)


def test_prefix_tokens_keep_their_values_and_only_cells_are_scaled() -> None:
    x = torch.randn(3, 22)
    carried = resample_axis(x, -1, TokenGrid(2, *OLD), TokenGrid(1, 6, 6), amplitude=True)
    assert carried.shape == (3, 37)
    assert torch.equal(carried[:, 0], x[:, 0])  # the first one stays, the last one goes
    cells = resample_axis(x[:, 2:], -1, TokenGrid(0, *OLD), TokenGrid(0, 6, 6), amplitude=True)
    assert torch.equal(carried[:, 1:], cells)


@pytest.mark.parametrize(("amplitude", "start"), [(True, 0.0), (False, None)])
def test_added_prefix_tokens(amplitude: bool, start: float | None) -> None:
    x = torch.randn(3, 21)
    carried = resample_axis(x, -1, TokenGrid(1, *OLD), TokenGrid(3, *OLD), amplitude=amplitude)
    assert torch.equal(carried[:, :1], x[:, :1])
    assert torch.equal(carried[:, 3:], x[:, 1:])  # cells of the same grid: bit for bit
    expected = x[:, 1:].mean(-1, keepdim=True) if start is None else torch.zeros(3, 1)
    torch.testing.assert_close(carried[:, 1:3], expected.expand(3, 2))


@pytest.mark.parametrize("extra", ["", ",base=silu", ",edge_scales=True"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", [SMALLER.get(name, name) for name in BASES])
def test_an_added_token_is_absent_at_first_and_learns(basis: str, order: str, extra: str) -> None:
    op = KArAtOperator(2, 20, f"{basis}-b,{order}{extra}").double()
    scores = torch.randn(1, 2, 3, 21, dtype=torch.float64)
    before = op(scores[..., 1:])
    karat.resample_operator(op, OLD, OLD, 0, 1)
    sigma = op(scores)
    torch.testing.assert_close(sigma[..., 1:], before)
    assert (sigma[..., 0] == 0).all()
    (sigma * torch.randn_like(sigma)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in op.parameters())


def test_dropping_a_token_is_what_masking_it_was() -> None:
    for order in ORDERS:
        op = KArAtOperator(2, 21, f"g2b,{order}").double()
        scores = torch.randn(1, 2, 3, 21, dtype=torch.float64)
        keep = torch.arange(21) > 0
        masked = op(scores, keep[None, None, None])
        karat.resample_operator(op, OLD, OLD, 1, 0)
        torch.testing.assert_close(op(scores[..., 1:]), masked[..., 1:])


def test_sequences_are_grids_of_one_row() -> None:
    op = KArAtOperator(2, 10, "g2b").double()
    weights = op.projector.detach().clone()
    karat.resample_operator(op, 10, 20)
    assert op.num_tokens == 20
    along = F.interpolate(weights.mT[:, :, None], (1, 20), mode="bicubic")[:, :, 0].mT / 2
    torch.testing.assert_close(op.projector.detach(), along)


def test_shapes_of_wavelets_are_interpolated_but_not_scaled() -> None:
    op = KArAtOperator(1, 20, "dog-b")
    with torch.no_grad():
        op.layers[0].translation.fill_(0.3)
        op.layers[0].dilation.fill_(2.0)
        op.layers[0].weight.fill_(1.0)
        op.layers[0].factor.fill_(1.0)
    layer = karat.resample_operator(op, OLD, (8, 10)).layers[0]
    torch.testing.assert_close(layer.translation.detach(), torch.full((1, 1, 80, 12), 0.3))
    torch.testing.assert_close(layer.dilation.detach(), torch.full((1, 1, 80, 12), 2.0))
    torch.testing.assert_close(layer.values()["weight"].detach(), torch.full((1, 1, 80, 12), 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    op = karat.resample_operator(KArAtOperator(2, 20, "g2b").to(dtype), OLD, (3, 3))
    assert {p.dtype for p in op.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), (5, 5)), "has 20 tokens.*4x4 make 16"),
        ((OLD, (0, 5)), "at least 1"),
        ((OLD, (4, 6.0)), r"whole numbers of at least 1, got \(4, 6.0\); a quotient"),
        ((OLD, 6.5), r"whole numbers of at least 1, got 6.5"),
        ((OLD, (1, 2, 3)), r"\(height, width\)"),
        ((OLD, OLD, 0, -1), "prefix tokens must be >= 0"),
    ],
)
def test_bad_grids(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        karat.resample_operator(KArAtOperator(2, 20, "g2b"), *arguments)


# Models


def same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == state.keys() and all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("attention", ["g3b", "softmax"])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_of_the_same_size_is_untouched(name: str, attention: str) -> None:
    model = small_model(name, attention).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(name)
    before = model(x)
    assert karat.resample_tokens(model, img_size=x.shape[-1]) is model
    karat.resample_tokens(model, img_size=tuple(x.shape[-2:]), num_prefix_tokens=getattr(model, "num_prefix_tokens", 0))
    karat.resample_tokens(model)
    assert same_state(model, state)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("attention", ["g3b", "g3u", "softmax"])
@pytest.mark.parametrize("name", SMALL)
def test_a_resampled_model_equals_one_built_for_that_size(name: str, attention: str) -> None:
    backbone = backbone_of(small_model(name))
    if attention == "g3u" and not backbone.universal:
        pytest.skip("blockwise only")
    side = SMALL[name][1]["img_size"]
    for new in (2 * side, 3 * side if backbone.windows else side // 2):
        model = karat.resample_tokens(small_model(name, attention), img_size=new).eval()
        window = {"window_size": 4 * new // side} if backbone.windows else {}
        fresh = small_model(name, attention, img_size=new, **window).eval()
        fresh.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, new, new)
        assert torch.equal(model(x), fresh(x))
        assert torch.isfinite(model(x)).all()


def test_images_that_are_not_square() -> None:
    for name in ("vit", "vit_registers", "swin"):
        side = SMALL[name][1]["img_size"]
        model = karat.resample_tokens(small_model(name, "g3b"), img_size=(side, 2 * side))
        assert torch.isfinite(model(torch.randn(1, 3, side, 2 * side))).all()


@pytest.mark.parametrize("name", ["vit", "vit_no_prefix", "vit_registers", "vit_norms"])
@pytest.mark.parametrize("prefix", [0, 1, 3, 7])
def test_prefix_tokens_of_a_vit(name: str, prefix: int) -> None:
    model = small_model(name, "g3u")
    positions = model.pos_embed.detach().clone()
    karat.resample_tokens(model, num_prefix_tokens=prefix)
    assert model.num_prefix_tokens == prefix
    assert model.karat_operator.num_tokens == 16 + prefix
    assert torch.equal(model.pos_embed[:, -16:], positions[:, -16:])
    model(images(name)).sum().backward()
    assert model.forward_features(images(name)).shape[1] == 16 + prefix


def test_dropping_the_class_token_pools_by_the_average() -> None:
    model = karat.resample_tokens(small_model("vit", "g3b"), num_prefix_tokens=0).eval()
    assert model.cls_token is None
    x = images("vit")
    expected = model.head(model.forward_features(x).mean(1))
    torch.testing.assert_close(model(x), expected)


def test_an_added_register_changes_nothing_for_the_others() -> None:
    """Its key is absent from every operator, so the old tokens are what they were."""
    model, x = small_model("vit", "g3b").eval(), images("vit")
    before = model(x)
    karat.resample_tokens(model, num_prefix_tokens=3)
    torch.testing.assert_close(model(x), before)
    assert model.reg_token.shape == (1, 2, 24)
    karat.resample_tokens(model, num_prefix_tokens=1)
    torch.testing.assert_close(model(x), before)
    assert model.reg_token is None


def test_swin_with_the_same_window_keeps_its_operators() -> None:
    model = small_model("swin", "g3b").eval()
    before = {name: op.W for name, op in karat.karat_operators(model).items()}
    karat.resample_tokens(model, img_size=64, window_size=4)
    assert all(op.W is before[name] for name, op in karat.karat_operators(model).items())
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


def test_a_model_resized_behind_our_back_says_what_to_call() -> None:
    model = small_model("vit", "g3b")
    VisionTransformer.set_input_size(model, img_size=(32, 32))  # past the method of the converted model
    with pytest.raises(ValueError, match=r"17 tokens and got 65.*resample_tokens"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"resample_tokens instead of the model's set_input_size"):
        karat.resample_tokens(model, img_size=48)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit", {"img_size": 0}, "img_size must be"),
        ("vit", {"img_size": (16, 16, 16)}, "img_size must be"),
        ("vit", {"img_size": 3}, "smaller than a patch"),
        ("vit", {"num_prefix_tokens": -1}, ">= 0"),
        ("vit", {"window_size": 4}, "window_size is Swin's"),
        ("deit_distilled", {"num_prefix_tokens": 1}, "distilled"),
        ("convit", {"num_prefix_tokens": 0}, "ConViT"),
        ("convit", {"img_size": (16, 32)}, "square"),
        ("vit", {"img_size": 24.0}, "whole numbers of at least 1, got 24.0"),
        ("vit", {"img_size": (24.0, 24)}, "whole numbers of at least 1, got"),
        ("swin", {"num_prefix_tokens": 1}, "no prefix tokens"),
    ],
)
def test_what_a_model_cannot_have(name: str, arguments: dict, message: str) -> None:
    model = small_model(name, "g3b")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        karat.resample_tokens(model, **arguments)
    assert same_state(model, state)


def test_other_models_are_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet10t")
    with pytest.raises(ValueError, match="ResNet is no model that karat can resample"):
        karat.resample_tokens(model, img_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [None, 0])
@pytest.mark.parametrize("attention", ["g3b", "g3u"])
def test_vit_tiny_from_224_to_384(attention: str, prefix: int | None) -> None:
    model = karat.create_model("vit_tiny_patch16_224", attention, depth=2, num_classes=10).eval()
    karat.resample_tokens(model, img_size=384, num_prefix_tokens=prefix)
    assert {op.num_tokens for op in karat.karat_operators(model).values()} == {577 if prefix is None else 576}
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 384, 384))).all()


@pytest.mark.slow
def test_swin_tiny_from_224_to_384() -> None:
    model = karat.create_model("swin_tiny_patch4_window7_224", "g3b", depths=(2, 2, 2, 2), num_classes=10).eval()
    karat.resample_tokens(model, img_size=384)
    assert {op.num_tokens for op in karat.karat_operators(model).values()} == {144}
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 384, 384))).all()


NEW_FORMS = ("static-b,rank=3", "static-b,rank=None", "g2b,rank=3,position=query")
NEW_FORMS += ("g2b,rank=3,order=Pointwise,position=query",)
NEW_FORMS += ("row-b,rank=None", "g2b,rank=None,order=Pointwise", "dog-b,rank=None,order=Pointwise,base=silu")


@pytest.mark.parametrize("spec", NEW_FORMS)
def test_places_of_queries_are_carried_unscaled(spec: str) -> None:
    """Operators constant over positions, the query's place included: their row sums survive, and so does C."""
    op = KArAtOperator(2, math.prod(OLD), spec).double()
    with torch.no_grad():
        for parameter in op.parameters():
            nn.init.normal_(parameter)
        for layer, axes in zip(op.layers, op.layout.layers, strict=True):
            for parameter in layer.parameters():
                flatten(parameter, axes)
        for matrix, axes in ((op.W, op.layout.W), (op.C, op.layout.C)):
            if matrix is not None:
                flatten(matrix, axes)
    scores = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64)[:1, None]
    expected = op(scores.expand(1, 2, math.prod(OLD), math.prod(OLD))).sum(-1)[..., :1]
    C = None if op.C is None or op.W is None else op.places[:, :1].clone()
    grid = OLD
    for new in NEW:
        karat.resample_operator(op, grid, new)
        grid, n = new, math.prod(new)
        torch.testing.assert_close(op(scores.expand(1, 2, n, n)).sum(-1), expected.expand(1, 2, n))
        if C is not None:
            torch.testing.assert_close(op.places, C.expand(-1, n, -1))


@pytest.mark.parametrize("spec", NEW_FORMS)
def test_the_new_forms_keep_prefix_tokens_and_the_same_grid(spec: str) -> None:
    op = KArAtOperator(2, 1 + math.prod(OLD), spec)
    for parameter in op.parameters():
        nn.init.normal_(parameter)
    values = {name: value.clone() for name, value in op.state_dict().items()}
    karat.resample_operator(op, OLD, OLD, old_prefix=1)
    assert all(torch.equal(value, values[name]) for name, value in op.state_dict().items())
    karat.resample_operator(op, OLD, (3, 7), old_prefix=1, new_prefix=2)
    fresh = KArAtOperator(2, 23, spec).state_dict()
    assert {name: value.shape for name, value in op.state_dict().items()} == {n: v.shape for n, v in fresh.items()}
    if op.C is not None:
        columns = slice(1 if op.W is None else None)
        assert torch.equal(op.places[:, 0, columns], (values["C"] * values["C_factor"])[:, 0, columns])
