"""Tiny runs for the tests of training: a model of some thousand parameters on a part of the scanned digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from karat.runs.classification import Settings

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "data": "digits",
    "recipe": "quick",
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "data_fraction": 0.1,
    "batch_size": 16,
    "epochs": 3,
    "warmup_epochs": 1,
    "track": (),
    "device": "cpu",
}
# every source of randomness that a step may have
NOISY: dict[str, Any] = {"drop_path": 0.1, "drop": 0.1, "mixup": 0.8, "cutmix": 1.0, "model_ema_decay": 0.9}


def tiny(output: Path, **values: Any) -> Settings:
    """Settings of a run that takes a fraction of a second."""
    return Settings.make(**{**TINY, "output": output, **values})


def options(output: Path, **values: Any) -> list[str]:
    """The same as command-line options."""
    line = []
    for name, value in {**TINY, "output": output, **values}.items():
        line.append(f"--{name.replace('_', '-')}")
        line += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return line


def outcome(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What must repeat bit for bit: all saved weights as bytes, and the metrics without times and memory."""
    weights = {}
    for file in sorted(run.glob("*.safetensors")):
        weights |= {f"{file.name}:{name}": tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    timed = ("seconds", "ms_per_step", "images_per_second", "peak_memory_mib")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k not in timed} for line in lines]
