"""Curves are the operator's edges; formulas that were planted are recovered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import karat
from karat.analyze.attention import attention_of
from karat.analyze.functions import (
    arguments_of,
    coefficients,
    curves,
    instead_of_edges,
    learned_head,
    operator_of_block,
    operators_of,
    score_range,
)
from karat.analyze.symbolic import fit_formula
from support.small_models import small_model

X = np.linspace(-3, 3, 201)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize(
    ("attention", "layer"), [("g2b,rank=3", 0), ("dog-b,rank=3,order=PhiPhi", 1), ("g1b,rank=None", 0)]
)
def test_curves_are_the_operators_edges(attention: str, layer: int, spread: bool) -> None:
    op = karat.KArAtOperator(3, 7, attention)
    x = torch.linspace(-2, 2, 11)
    found = curves(op, 1, x, layer=layer, edges=5, spread=spread)
    assert found.values.shape == (5, 11)
    assert len(set(zip(found.outputs.tolist(), found.inputs.tolist(), strict=True))) == 5
    every = op.edges(x, layer)[:, 1]  # (X,P,Q)
    for values, p, q in zip(found.values, found.outputs, found.inputs, strict=True):
        assert torch.equal(values, every[:, p, q].detach())
    if not spread:
        energy = every.square().sum(0).flatten()
        torch.testing.assert_close(every[:, found.outputs[0], found.inputs[0]].square().sum(), energy.max())


def test_all_edges_come_when_none_are_chosen() -> None:
    op = karat.KArAtOperator(2, 5, "g1b,rank=3")
    found = curves(op, 0, torch.linspace(-1, 1, 4))
    assert torch.equal(found.values, op.edges(found.x)[:, 0].flatten(1).T.detach())
    assert found.joined(found).values.shape == (30, 4)


@pytest.mark.parametrize(("N", "count"), [(17, 40), (5, 14), (7, 20), (1, 2)])
def test_no_edge_comes_twice(N: int, count: int) -> None:
    found = curves(karat.KArAtOperator(2, N, "g1b,rank=3"), 0, torch.linspace(-1, 1, 4), edges=count)
    assert len(set(zip(found.outputs.tolist(), found.inputs.tolist(), strict=True))) == count
    assert set(found.outputs.tolist()) == {0, 1, 2} or count < 3


@pytest.mark.parametrize("order", ["WPhi", "PhiPhi", "PhiW"])
def test_edges_act_on_scores_or_on_what_w_makes_of_them(order: str) -> None:
    """Σ_q φ_nq of the arguments is what the first layer gives."""
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    attention = f"g2b,rank=2,softmax_heads=(0,),order={order}"
    model = karat.create_model("vit_tiny_patch16_224", attention=attention, **small).eval()
    (block,), op = attention_of(model, torch.randn(2, 3, 8, 8)), operator_of_block(model, 0)
    assert op is not None
    arguments = arguments_of(op, block)  # (B,H',M,Q)
    each = torch.stack([op.edges(arguments[:, h])[..., h, :, :].diagonal(dim1=-3, dim2=-1) for h in range(2)], 1)
    sums = each.sum(-1)  # (B,H',M,P)
    if order == "PhiW":
        torch.testing.assert_close(sums, block.sigma[:, 1:], atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(arguments, block.scores[:, 1:])


def test_what_has_no_edges_is_called_by_its_name() -> None:
    names = {}
    for name, attention in (("vit", "softmax"), ("vit", "diff"), ("convit", "g1b"), ("vit", "sigmoid")):
        model = small_model(name, attention, **({"num_heads": 2} if attention == "diff" else {}))
        names[name, attention] = instead_of_edges(model, 0, operator_of_block(model, 0))
    assert list(names.values()) == [
        "keeps softmax",
        "keeps differential attention",
        "keeps gated positional attention (GPSA)",
        "keeps sigmoid",
    ]


def test_heads_and_blocks_that_are_not_there() -> None:
    op = karat.KArAtOperator(3, 5, "g1b,rank=2,softmax_heads=1")
    assert learned_head(op, 1) == 1
    with pytest.raises(ValueError, match=r"head 2 keeps softmax .* 0, 1"):
        curves(op, 2, torch.zeros(1))
    with pytest.raises(ValueError, match="heads 0 to 2"):
        curves(op, 5, torch.zeros(1))
    with pytest.raises(ValueError, match="layer must be 0 to 0"):
        curves(op, 0, torch.zeros(1), layer=1)
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = karat.create_model("vit_tiny_patch16_224", attention="g1u,rank=2,blocks=(1,)", **small)
    assert operator_of_block(model, 0) is None
    assert operator_of_block(model, 1) is next(iter(operators_of(model).values()))
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        operator_of_block(model, 2)
    with pytest.raises(ValueError, match="no learnable attention"):
        operators_of(karat.create_model("vit_tiny_patch16_224", attention="softmax", **small))


def test_operators_without_edges_and_with_one() -> None:
    with pytest.raises(ValueError, match="no edge functions"):
        curves(karat.KArAtOperator(3, 5, "static-b,rank=2"), 0, torch.zeros(1))
    assert {group.name for group in coefficients(karat.KArAtOperator(3, 5, "static-b,rank=2"))} == {"W", "C"}
    op = karat.KArAtOperator(3, 5, "g1b,rank=None,order=Pointwise")
    found = curves(op, 2, torch.linspace(-1, 1, 4), edges=7)
    assert torch.equal(found.values[0], op.edges(found.x)[:, 2, 0, 0].detach())
    assert len(found.values) == 1
    placed = coefficients(karat.KArAtOperator(3, 5, "g1b,rank=2,position=query"))
    assert {group.name for group in placed} == {"coefficients", "W", "C"}


def test_distributions_count_every_number() -> None:
    op = karat.KArAtOperator(3, 7, "g2b,rank=4,edge_scales=True")
    found = coefficients(op, bins=10)
    assert {one.name for one in found} == {"coefficients", "basis_scale", "W"}
    for one in found:
        source = op.projector if one.name == "W" else op.layers[0].values()[one.name]
        mine = source[one.head].detach()
        assert one.counts.sum() == mine.numel()
        assert one.mean == pytest.approx(float(mine.mean()), abs=1e-6)
        assert one.std == pytest.approx(float(mine.std(unbiased=False)), abs=1e-6)


def test_score_range_is_never_empty() -> None:
    low, high = score_range(torch.full((3,), 2.0))
    assert low < 2.0 < high


@pytest.mark.parametrize(
    ("family", "y"),
    [
        ("sin", 1.5 * np.sin(2.3 * X) - 0.2),
        ("cos", -0.7 * np.cos(1.1 * X)),
        ("exp", 0.4 * np.exp(-0.9 * X) + 1),
        ("exp", 1e-3 * np.exp(2 * X)),
        ("linear", 0.3 * X + 4),
        ("quadratic", 2 * X**2 - X + 1),
        ("gaussian", 3 * np.exp(-((X - 0.8) ** 2) / (2 * 0.4**2))),
    ],
)
def test_each_family_is_recovered(family: str, y: np.ndarray) -> None:
    found = fit_formula(X, y)
    assert found.family == family
    assert found.error < 1e-4
    assert np.allclose(found.values, y, atol=1e-3 * np.ptp(y))


def test_sin_2x_is_recovered_from_a_fourier_edge() -> None:
    op = karat.KArAtOperator(1, 5, "g3b,rank=2").double()
    with torch.no_grad():
        op.layers[0].factor.fill_(1.0)
        op.layers[0].coefficients.zero_()
        op.layers[0].coefficients[0, 4, 3, 1] = 1.0  # cos x, 2x, 3x, sin x, 2x, 3x of edge q=3, p=1
    strongest = curves(op, 0, torch.from_numpy(X), edges=1, spread=False)
    assert (int(strongest.outputs[0]), int(strongest.inputs[0])) == (1, 3)
    found = fit_formula(X, strongest.values[0].numpy())
    assert found.family == "sin"
    assert found.text == "1 sin(2 x)"
    assert found.error < 1e-6


def test_constants_and_bad_points() -> None:
    assert fit_formula(X, np.full_like(X, 3.0)).family == "constant"
    assert fit_formula(X, np.random.default_rng(0).standard_normal(len(X))).error > 0.5
    with pytest.raises(ValueError, match="8 or more"):
        fit_formula(X[:5], X[:5])
    with pytest.raises(ValueError, match="increasing"):
        fit_formula(X[::-1].copy(), X)
