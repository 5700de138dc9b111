"""Evaluation mode for a while: every module's own mode comes back, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karat.detect.evaluate import detect
from karat.models.evaluating import evaluating
from karat.train.evaluate import evaluate


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval(), nn.Sequential(nn.Dropout()))
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def broken_batches() -> Iterator[tuple[Tensor, Tensor]]:
    raise OSError("the disk is gone")
    yield


@pytest.mark.parametrize("measure", [evaluate, lambda *given: detect(*given, [1])], ids=["classify", "detect"])
def test_an_evaluation_that_fails_leaves_the_model_in_training(measure: Callable[..., Any]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        measure(model, broken_batches(), SimpleNamespace(device=torch.device("cpu")))
    assert model.training
