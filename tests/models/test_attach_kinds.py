"""Kinds of attention in models without a record: σ and output computed apart, softmax beside, saved, exported."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import karat
from support.attached import KINDS, computed_apart


def converted(kind: str, attention: str) -> tuple[nn.Module, Tensor]:
    model, x = KINDS[kind].model_and_input()
    karat.karatize(model, attention, example=x)
    torch.manual_seed(1)
    for operator in karat.karat_operators(model).values():
        for parameter in operator.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, x


@pytest.mark.parametrize("attention", ["g3b", "g2b,residual=softmax", "g2b,order=PhiW"])
@pytest.mark.parametrize("kind", KINDS)
def test_sigma_and_output_are_those_of_an_independent_computation(kind: str, attention: str) -> None:
    original, x = KINDS[kind].model_and_input()
    model, _ = converted(kind, attention)
    operators = list(karat.karat_operators(model).values())
    assert len(operators) == KINDS[kind].operators
    with karat.record(model) as recorded, torch.no_grad():
        out = model(x)
    with computed_apart(operators, KINDS[kind].axis) as seen:
        expected = original(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for found, sigma in zip(recorded.values(), seen, strict=True):
        torch.testing.assert_close(found.attention, sigma, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_softmax_with_gates_at_zero_it_is_the_original(kind: str) -> None:
    original, x = KINDS[kind].model_and_input()
    model, _ = converted(kind, "g3b,residual=softmax,softmax_heads=0")
    with torch.no_grad():
        for operator in karat.karat_operators(model).values():
            operator.gate.zero_()
        torch.testing.assert_close(model(x), original(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_copied_it_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, x = converted(kind, "g3b")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    fresh, _ = KINDS[kind].model_and_input()
    karat.karatize(fresh, "g3b", example=x)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same(kind: str) -> None:
    model, x = converted(kind, "g3b")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_exported_it_is_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX is an optional extra: pip install 'karat[export]'")
    from karat.share.export import export_onnx, export_pt2, graph

    model, x = converted(kind, "g3b")
    once = functools.cache(graph.exported_program)  # both are made of the same graph
    for name in ("onnx", "pt2"):
        monkeypatch.setattr(f"karat.share.export.{name}.exported_program", once)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models' own traced asserts
        assert export_pt2(model, tmp_path / "model.pt2", tuple(x.shape[1:])) <= 1e-4
        assert export_onnx(model, tmp_path / "model.onnx", tuple(x.shape[1:])) <= 1e-4
