"""ONNX through torch's dynamo exporter, checked in onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat.runs.files import draft_of
from karat.share.export.graph import TOLERANCE, TRACED, as_text, exported_program, largest_difference

OPSET = 23  # the newest that torch's exporter writes itself
OPSETS = range(18, 26)  # from its own library of functions' to the newest that onnxruntime runs
NEEDED = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def export_onnx(
    model: nn.Module,
    path: str | Path,
    shape: tuple[int, int, int],
    *,
    opset: int = OPSET,
    metadata: Mapping[str, object] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Write a model as an ONNX file with input "images" (batch,C,H,W), output "logits" (batch,classes), any batch.

    It computes in float32, for a model in another precision with the same weights. The file is run by onnxruntime with
    one image and with three before it takes its name.

    Args:
        model: images (B,C,H,W) -> logits (B,classes). shape: (C,H,W).
        opset: version of ONNX's operators, 18 to 25.
        metadata: plain values kept in the file as metadata properties.
        tolerance: how far the logits may be from PyTorch's, see `largest_difference`.

    Returns:
        How far they are.

    Raises:
        ValueError: packages that aren't there, another opset, a model that can't be traced or translated, or logits
            that differ by more; nothing is left at `path` then.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(f"ONNX needs {', '.join(absent)}: pip install 'karat[export]'")
    if opset not in OPSETS:
        raise ValueError(f"opset {opset} can't be written; choose one of {OPSETS.start} to {OPSETS.stop - 1}")
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in model.parameters()):
        model = copy.deepcopy(model).float()  # few runtimes have every operator in half precision
    program = exported_program(model, shape)
    with draft_of(Path(path)) as draft, _quiet():
        onnx_program: Any = _translated(program, shape, opset)
        _name_batch(onnx_program.model)
        onnx_program.model.metadata_props.update(as_text(metadata))
        onnx_program.save(draft)
        return largest_difference(model, runner(draft), shape, tolerance)


def _translated(program: torch.export.ExportedProgram, shape: tuple[int, int, int], opset: int) -> Any:
    try:
        return torch.onnx.export(
            program,
            (torch.zeros(TRACED, *shape),),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"the model can't be translated to ONNX: {reason}") from error


def _name_batch(model: Any) -> None:
    """Call the open dimension "batch": a program that was traced before has but a number for it."""
    import onnx_ir

    own = model.graph.inputs[0].shape[0].value
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, onnx_ir.SymbolicDim) and isinstance(size.value, str):
                value.shape[axis] = onnx_ir.SymbolicDim(re.sub(rf"\b{own}\b", BATCH, size.value))


def runner(path: Path) -> Any:
    """An ONNX file as a function from images (B,C,H,W) to logits, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.float().cpu().numpy()})
        return torch.from_numpy(logits)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of and logs its own internals; what a user must know is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
