"""How large a trained model's scores are, block by block: what drives an operator's gradient at high rates.

    python benchmarks/score_sizes.py runs/stability/bccd-long--g1b-lr0.002-s0 ...

For each run, a detector's or a classifier's, on some of its training images: the standard deviation of all scores of
a block, and within a row (mean over rows). Softmax knows the second alone, since it isn't changed by what is added to
a whole row; a basis function is.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat.analyze.loading import open_run
from karat.detect.data import load_data
from karat.detect.detector import build_detector
from karat.detect.settings import DetectSettings
from karat.runs.files import read_json
from karat.runs.folder import CONFIG, read_config, read_weights


def spread(qkv: Tensor, heads: int) -> tuple[float, float]:
    """The standard deviation of q·k/√D over everything, and within rows."""
    B, N, C = qkv.shape
    q, k, _ = qkv.view(B, N, 3, heads, C // (3 * heads)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.std().item(), scores.std(-1).mean().item()


def detector(run: Path) -> tuple[nn.Module, tuple[Any, ...]]:
    """A detector as it is trained, and one batch of its training images."""
    settings, _ = read_config(run, DetectSettings)
    data = load_data(settings)
    model: nn.Module = build_detector(settings, data.num_classes)
    model.load_state_dict(read_weights(run))
    return model.train(), next(iter(data.train))


def classifier(run: Path) -> tuple[nn.Module, tuple[Any, ...]]:
    """A classifier in evaluation mode, and 32 of its training images."""
    opened = open_run(run)
    return opened.model("last"), (opened.samples(32, "train").images,)


def sizes(run: Path) -> list[tuple[float, float]]:
    """`spread` of every block."""
    torch.manual_seed(0)
    model, inputs = (detector if read_json(run / CONFIG)["task"] == DetectSettings.task else classifier)(run)
    found: list[tuple[float, float]] = []
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            heads = module.num_heads
            module.qkv.register_forward_hook(lambda _, __, out, heads=heads: found.append(spread(out, heads)))
    with torch.no_grad():
        model(*inputs)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        shown = "  ".join(f"{whole:.1f} ({row:.1f})" for whole, row in sizes(Path(name)))
        print(f"{Path(name).name}: {shown}")
