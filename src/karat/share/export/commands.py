"""`karat export`: options, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from karat.errors import parse
from karat.values import File, Positive, Range

# What of a model's configuration the file says.
NOTED = ("model", "attention", "mlp", "class_names", "mean", "std", "crop_pct", "interpolation")


@dataclass(frozen=True)
class Export:
    """Write a model as one file that runs without karat, for any batch size, and check its logits against PyTorch."""

    model: tyro.conf.Positional[str]
    """A run's folder, a saved model's folder, or a name on the Hugging Face Hub."""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx, for onnxruntime and others; pt2, for torch.export.load."""
    output: File | None = None
    """The file to write; none: model.onnx or model.pt2 in the model's folder, or here for a name on the Hub."""
    weights: Literal["last", "best", "ema"] = "last"
    """For a run: weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    opset: Annotated[int, Range("give 18 to 25", 18, 25)] = 23
    """With onnx: version of ONNX's operators, 18 to 25."""
    tolerance: Positive = 1e-4
    """Largest difference of the logits from PyTorch's."""
    overwrite: bool = False
    """Replace a file that is there already."""


def export(arguments: Sequence[str]) -> None:
    """karat export."""
    parsed = parse(lambda: tyro.cli(Export, args=arguments, prog="karat export"), "karat export")
    from karat.share.export import export_onnx, export_pt2
    from karat.share.hub.runs import open_model

    folder = Path(parsed.model)
    path = parsed.output or (folder if folder.is_dir() else Path()) / f"model.{parsed.format}"
    if path.exists() and not parsed.overwrite:
        raise ValueError(f"{path} is there already: give another --output, or --overwrite")
    model = open_model(parsed.model, parsed.weights)
    config = model.config
    shape = (config.in_chans, *config.sides)
    metadata = {name: getattr(config, name) for name in NOTED}
    write = export_pt2 if parsed.format == "pt2" else partial(export_onnx, opset=parsed.opset)
    difference = write(model.backbone, path, shape, metadata=metadata, tolerance=parsed.tolerance)
    print(
        f"saved: {path} ({path.stat().st_size / 2**20:.1f} MiB), images (batch, {', '.join(map(str, shape))})\n"
        f"checked with 1 and 3 images: logits differ from PyTorch's by at most {difference:.1e}"
    )
