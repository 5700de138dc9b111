"""Analyses of models that karat has no record of: right where they make sense, one line where they don't."""

from __future__ import annotations

import pytest
import torch

import karat
from karat.analyze import figures
from karat.analyze.ablation import ablate
from karat.analyze.attention import attention_of, class_maps, grid_of, rollout
from karat.analyze.functions import operator_of_block
from karat.analyze.parts import parts_of
from karat.analyze.quality import entropy, measures, sparsity
from karat.analyze.spectrum import spectrum
from support.attached import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_measures_spectra_and_figures_are_of_every_kind(kind: str) -> None:
    model, x = KINDS[kind].model_and_input()
    karat.karatize(model, "g3b", example=x)
    blocks = attention_of(model, x)
    operators = list(karat.karat_operators(model).values())
    assert [operator_of_block(model, i) for i in range(len(blocks))] == operators
    for block in blocks:
        assert all(torch.as_tensor(value).isfinite().all() for value in measures(block.sigma).values())
    spectrum(blocks[-1].sigma)
    figures.draw_heads({block.name: block.sigma[0] for block in blocks})


@pytest.mark.parametrize(("kind", "parts"), [("rotary", 2), ("two calls", 4), ("windows, written out", None)])
def test_parts_are_told_apart_or_refused(kind: str, parts: int | None) -> None:
    model, x = KINDS[kind].model_and_input()
    karat.karatize(model, "g3b,residual=softmax", example=x)
    if parts is None:
        with pytest.raises(ValueError, match="cut into windows"):
            parts_of(model, attention_of(model, x))
    else:
        assert len(parts_of(model, attention_of(model, x))) == parts
    with pytest.raises(ValueError, match="karat has no record of"):
        ablate(model, x, torch.tensor([0, 1]))


def test_a_shared_operator_is_that_of_every_block() -> None:
    model, x = KINDS["rotary"].model_and_input()
    karat.karatize(model, "g3u,blocks=(1,)", example=x)
    assert operator_of_block(model, 0) is None
    assert operator_of_block(model, 1) is model.karat_operator


def test_attention_that_ends_in_one_query_has_no_rollout() -> None:
    model, x = KINDS["talking heads"].model_and_input()
    karat.karatize(model, "g3b", example=x)
    sigmas = [block.sigma for block in attention_of(model, x)]
    assert class_maps(sigmas[0], grid_of(model)).shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match="as many queries as keys in the last block, got 1 and 5"):
        rollout(sigmas)


def test_one_key_and_long_matrices_are_drawn() -> None:
    one = torch.full((2, 3, 1), 0.7)
    assert torch.equal(entropy(one), torch.zeros(2, 3))
    assert torch.equal(sparsity(one), torch.ones(2, 3))
    width, height = figures.draw_heads({"0": torch.rand(1, 3000, 20), "1": torch.rand(2, 40, 20)}).get_size_inches()
    assert max(width, height) < 20
