"""Exported files answer as PyTorch does, at batch sizes that they weren't traced with."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import karat
import karat.share.hub.runs
from karat.basis import BASES
from karat.cli import main
from karat.operator.fixed import FIXED
from karat.share.export import export_onnx, export_pt2, exported_program, plain_path
from karat.share.export.graph import largest_difference
from support.small_models import BACKBONES, small_model

pytest.importorskip("onnxruntime", reason="ONNX is an optional extra: pip install 'karat[export]'")

TINY = {"img_size": 8, "depth": 1}  # N = 5
# the backbones beyond ViT, one block of each kind; the settings that take another path through the operator
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "convit": ("convit", "g3u", {"img_size": 8, "depth": 2, "local_up_to_layer": 1}),
    "swin": ("swin", "g3b", {"img_size": 16, "depths": (2,), "num_heads": (2,)}),  # the second block is shifted
    "shannon over keys": ("vit", "shannon(window=key)-b", TINY),
    "softmax with positions": ("vit", "softmax,position_bias=relative", TINY),
}
SHORT = {"bspline": "bspline(grid=2,order=2)"}
ONNX = {basis: ("vit", f"{SHORT.get(basis, basis)}-b", TINY) for basis in BASES} | OTHERS
ORDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PhiPhi": ("vit", "g2b,order=PhiPhi,base=silu", TINY),
    "PhiW, simplex": ("vit", "g2b,order=PhiW,simplex=row", TINY),
    "Full, residual": ("vit", "g2b,rank=None,residual=softmax,softmax_heads=1", TINY),
    "dog, PhiPhi, row": ("vit", "dog-u,order=PhiPhi,simplex=row", TINY),
    "position": ("vit", "g2b,position=query", TINY),
    "fixed gate": ("vit", "g2b,rank=3,residual=softmax,gate=0.5", TINY),
    "pointwise": ("vit", "g2b,rank=3,order=Pointwise,position=query,position_bias=relative", TINY),
    "row": ("vit", "row-b,rank=None,residual=softmax", TINY),
    "static": ("vit", "static-b,rank=3,residual=softmax", TINY),
    "grkan": ("vit", "g2b", {**TINY, "mlp": "grkan(groups=4)"}),
    "kan": ("vit", "softmax", {**TINY, "mlp": "kan(grid=2)"}),
}
ORDERS |= {name: ("vit", name, TINY) for name in FIXED}
CASES = ONNX | ORDERS


def test_every_backbone_is_exported() -> None:
    assert {*BACKBONES} <= {name for name, _, _ in ONNX.values()}


def tiny(case: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    name, attention, arguments = CASES[case]
    model = small_model(name, attention, **arguments).eval()
    with torch.no_grad():  # gates and biases start at zero: let every part speak
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, (3, arguments["img_size"], arguments["img_size"])


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    """onnxruntime without karat's own helper."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ONNX)
def test_onnx_equals_pytorch_for_every_basis_and_backbone(case: str, tmp_path: Path) -> None:
    model, shape = tiny(case)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, path, shape, metadata={"class_names": NAMES}) <= 1e-4
    for batch in (1, 5):
        x = torch.randn(batch, *shape)
        assert (run_onnx(path, x) - model(x)).abs().max() <= 1e-4
    import onnx

    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 23
    assert {entry.key: json.loads(entry.value) for entry in written.metadata_props}["class_names"] == NAMES
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


NAMES = ["a", "b", "c", "d"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fourier", "convit", "swin"])
def test_pt2_equals_pytorch(case: str, tmp_path: Path) -> None:
    model, shape = tiny(case)
    path = tmp_path / "model.pt2"
    assert export_pt2(model, path, shape, metadata={"class_names": NAMES}) <= 1e-4
    extra = {"karat.json": ""}
    again = torch.export.load(path, extra_files=extra).module()
    assert json.loads(json.loads(extra["karat.json"])["class_names"]) == NAMES
    for batch in (1, 5):
        x = torch.randn(batch, *shape)
        assert (again(x) - model(x)).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ORDERS)
def test_graphs_of_other_settings_equal_pytorch(case: str) -> None:
    model, shape = tiny(case)
    run = exported_program(model, shape).module()
    for batch in (1, 5):
        x = torch.randn(batch, *shape)
        assert (run(x) - model(x)).abs().max() <= 1e-5


def test_the_graph_is_plain_pytorch_and_the_model_is_left_as_it_was() -> None:
    model, shape = tiny("fourier")
    model.train()
    configs = [op.config for op in karat.karat_operators(model).values()]
    program = exported_program(model, shape)
    assert not any("karat" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert [op.config for op in karat.karat_operators(model).values()] == configs
    assert model.training
    with pytest.raises(RuntimeError, match="stop"), plain_path(model):
        raise RuntimeError("stop")
    assert [op.config for op in karat.karat_operators(model).values()] == configs


@pytest.mark.slow
def test_a_pt2_file_runs_without_karat(tmp_path: Path) -> None:
    model, shape = tiny("dog")
    export_pt2(model, tmp_path / "model.pt2", shape)
    x = torch.randn(4, *shape)
    save_file({"x": x, "logits": model(x).detach()}, tmp_path / "expected.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
expected = load_file(sys.argv[2])
logits = torch.export.load(sys.argv[1]).module()(expected["x"])
assert (logits - expected["logits"]).abs().max() <= 1e-4
assert "karat" not in sys.modules and "timm" not in sys.modules
"""
    line = [sys.executable, "-c", code, str(tmp_path / "model.pt2"), str(tmp_path / "expected.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_exported_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, shape = small_model("vit", "g2b,rank=2", **TINY).eval().to(dtype), (3, 8, 8)
    assert export_onnx(model, tmp_path / "model.onnx", shape) <= 1e-4
    assert next(model.parameters()).dtype == dtype
    x = torch.randn(2, *shape)
    assert torch.allclose(run_onnx(tmp_path / "model.onnx", x), copy.deepcopy(model).float()(x), atol=1e-4)


def test_logits_that_differ_are_refused() -> None:
    model, shape = tiny("fourier")
    assert largest_difference(model, model, shape, 0.0) == 0
    with pytest.raises(ValueError, match=r"differ from PyTorch's by .*, more than 0.0001"):
        largest_difference(model, lambda x: model(x) + 1e-3 * model(x).abs().max().clamp(min=1), shape, 1e-4)
    with pytest.raises(ValueError, match="differ"):
        largest_difference(model, lambda x: model(x) * torch.nan, shape, 1e-4)
    with pytest.raises(ValueError, match=r"a batch of 1 gives \(2, 4\)"):
        largest_difference(model, lambda x: model(x).expand(2, 4), shape, 1e-4)


def test_a_refused_file_is_not_left_behind(tmp_path: Path) -> None:
    model, shape = tiny("fourier")
    with pytest.raises(ValueError, match="differ"):
        export_pt2(model, tmp_path / "model.pt2", shape, tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="can't be exported"):
        export_pt2(model, tmp_path / "model.pt2", (3, 12, 12))


@pytest.mark.slow
def test_command(karat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = karat.share.hub.runs.open_model(karat_run)
    x = torch.randn(3, 1, 8, 8)
    onnx, pt2 = tmp_path / "run.onnx", tmp_path / "run.pt2"
    assert main(["export", str(karat_run), "--output", str(onnx)]) == 0
    assert "checked with 1 and 3 images" in capsys.readouterr().out
    assert (run_onnx(onnx, x) - model(x)).abs().max() <= 1e-4
    assert main(["export", str(karat_run), "--format", "pt2", "--output", str(pt2)]) == 0
    assert (torch.export.load(pt2).module()(x) - model(x)).abs().max() <= 1e-4
    capsys.readouterr()
    for line, words in (
        (["--output", str(onnx)], "is there already"),
        (["--output", str(tmp_path / "x.onnx"), "--opset", "12"], "--opset=12: give 18 to 25"),
        (["--output", str(tmp_path / "x.onnx"), "--tolerance", "0"], "--tolerance=0.0: give a positive value"),
        (["--format", "tflite"], "tflite"),
    ):
        assert main(["export", str(karat_run), *line]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
