"""Peak process memory of a training step, each way in a process of its own.

What is counted: the process's highest resident memory during the steps, minus that of the idle process, which has
imported everything and done one step of a toy, so that libraries, their threads and their code are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from karat.study.bench.step import build, step_of
from karat.train.memory import peak_resident

MIB = 2**20
TOY = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}


@dataclass(frozen=True)
class Peak:
    """MiB: the model at rest above the idle process, and the peak of a step above the idle process."""

    model: float
    step: float


def measure(
    name: str,
    attention: str,
    way: str,
    *,
    batch: int = 16,
    device: str = "cpu",
    steps: int = 3,
    model_options: Mapping[str, object] | None = None,
) -> Peak:
    """Peak of `steps` training steps of one model in a fresh process, resident (CPU) or as the allocator counts (GPU).

    `model_options` are timm's. Raises RuntimeError with the child's last line if it fails.
    """
    settings = (batch, device, steps, torch.get_num_threads(), json.dumps(dict(model_options or {})))
    arguments = [name, attention, way, *map(str, settings)]
    child = subprocess.run(
        [sys.executable, "-m", "karat.study.bench.memory", *arguments], capture_output=True, text=True
    )
    if child.returncode:
        reason = (child.stderr.strip() or "no message").splitlines()[-1]
        if child.returncode < 0:  # it had no last word
            reason = f"signal {-child.returncode} ended it, which is 9 where memory ran out"
        raise RuntimeError(f"measuring {way} of {name} failed: {reason}")
    return Peak(**json.loads(child.stdout.splitlines()[-1]))


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _child(name: str, attention: str, way: str, batch: int, device: str, steps: int, options: dict[str, Any]) -> Peak:
    if device == "cuda":
        step = step_of(build(name, way, attention, **options), batch, device=device, amp=torch.bfloat16)
        model = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return Peak(model / MIB, torch.cuda.max_memory_allocated() / MIB)
    step_of(build(name, way, attention, **options | TOY), 2)()
    idle = _resident()
    step = step_of(build(name, way, attention, **options), batch)
    model = _resident() - idle
    for _ in range(steps):
        step()
    return Peak(model / MIB, (peak_resident() - idle) / MIB)


if __name__ == "__main__":
    _name, _attention, _way, _batch, _device, _steps, _threads, _options = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _peak = _child(_name, _attention, _way, int(_batch), _device, int(_steps), json.loads(_options))
    print(json.dumps(asdict(_peak)))
