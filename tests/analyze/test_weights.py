"""Histograms count every weight; the divergence is Jensen-Shannon's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import karat
from karat.analyze.weights import divergence, histograms, kind_of
from karat.operator.fixed import FIXED
from karat.runs.files import write_tensors
from support.attached import KINDS


def test_divergence_at_its_limits_and_symmetric() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(1)
    r = torch.tensor([0.5, 0.5])
    assert divergence(p, r) == divergence(r, p) == pytest.approx(0.311278, abs=1e-6)


def test_histograms_along_checkpoints(tmp_path: Path) -> None:
    weight = torch.randn(4, 5)
    names = ("blocks.0.mlp.fc1.weight", "blocks.0.attn.operator.layers.0.coefficients", "karat_operator.W")
    for epoch in range(3):
        tensors = {name: weight + 10 * epoch * (index == 1) for index, name in enumerate(names)}
        write_tensors(tmp_path / f"{epoch}.safetensors", tensors)
    found = {h.kind: h for h in histograms([(e, tmp_path / f"{e}.safetensors") for e in range(3)], bins=16)}
    assert set(found) == {"MLP", "operator coefficients", "operator W"}
    for one in found.values():
        assert one.counts.sum(1).tolist() == [20, 20, 20]
        assert one.epochs == (0, 1, 2)
    assert found["MLP"].from_start.tolist() == pytest.approx([0, 0, 0])
    assert found["operator coefficients"].from_start.tolist() == pytest.approx([0, 1, 1])
    assert found["operator coefficients"].steps.tolist() == pytest.approx([0, 1, 1])


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "0.safetensors", {"head.weight": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ValueError, match=r"head\.weight holds NaN or Inf"):
        histograms([(0, tmp_path / "0.safetensors")])


def test_every_kind_is_told_by_name() -> None:
    kinds = {
        "blocks.3.attn.operator.gate": "operator gates",
        "blocks.3.attn.qkv.weight": "attention qkv",
        "blocks.3.attn.proj.bias": "attention projection",
        "pos_embed": "embedding",
        "patch_embed.proj.weight": "embedding",
        "head.weight": "head",
        "norm.weight": "other",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


OPERATORS = [name for name in FIXED if karat.KArAtConfig.parse(name).has_operator]


@pytest.mark.parametrize("attention", ["g1b,residual=softmax", "static-b,rank=2", *OPERATORS])
@pytest.mark.parametrize("kind", ["rotary", "two calls"])
def test_every_weight_of_an_operator_is_one(attention: str, kind: str) -> None:
    """Of each operator, where a module calls for attention once or several times."""
    model, image = KINDS[kind].model_and_input()
    karat.karatize(model, attention, example=image)
    operators = karat.karat_operators(model)
    assert len(operators) == KINDS[kind].operators
    for place, operator in operators.items():
        names = {f"{place}.{name}" for name, _ in operator.named_parameters()}
        assert all(kind_of(name).startswith("operator ") for name in names), names
