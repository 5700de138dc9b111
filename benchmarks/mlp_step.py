"""A training step with each KAN in the MLP's place against the plain MLP: time, memory, parameters, multiply-adds.

python benchmarks/mlp_step.py --threads 2 --output docs/results/performance
benchmarks/peers.py lists the calls behind the tables of docs/results/peers.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from torch import nn

from karat.models.flops import count_parameters
from karat.runs.classification import SMALL_MODEL, Settings
from karat.runs.model import build_model, input_size
from karat.study.bench.measurement import Measurement
from karat.study.bench.memory import MIB
from karat.study.bench.step import step_of
from karat.study.bench.timing import alternate
from karat.study.compare import contender, count_operations
from karat.train.memory import peak_resident

CLASSES = 10


@dataclass(frozen=True)
class MlpStep:
    """Time and memory of an AdamW step on random images, one row a contender, all of them in one alternating run."""

    contenders: tuple[str, ...] = ("softmax", "softmax/grkan", "softmax/kan", "softmax/fourierkan", "softmax/fastkan")
    """named as for karat compare; the first is what the others are compared with"""
    model: str = "vit_tiny_patch16_224"
    """timm's name"""
    small: bool = False
    """at the sizes that karat train takes for small images: 32 pixels, patch 4, width 96, 6 blocks, 3 heads"""
    batch: int = 8
    """images"""
    rounds: int = 9
    """counted rounds; the median is quoted"""
    threads: int = 0
    """CPU threads; 0 keeps torch's own choice"""
    device: str = "cpu"
    """cpu or cuda"""
    output: Path | None = None
    """folder for NAME.json; nothing is written without it"""
    name: str = "mlp_step"
    """the file's name"""
    peak_of: str | None = None
    """measure only the memory of this contender, in this process; the script calls itself so"""

    def settings(self, name: str) -> Settings:
        """Of a contender's model."""
        sizes: dict[str, Any] = SMALL_MODEL if self.small else {}
        return contender(name, Settings(model=self.model, **sizes))

    def build(self, name: str) -> nn.Module:
        """A contender's model."""
        torch.manual_seed(0)
        return build_model(self.settings(name), CLASSES, 3)

    def step(self, name: str) -> Callable[[], float]:
        """A closure that does one step."""
        settings = self.settings(name)
        side = settings.img_size or input_size(settings.model)
        return step_of(self.build(name), self.batch, device=self.device, side=side)

    def report_peak(self, name: str) -> None:
        """In a process of its own: print the peak of three steps above the idle process, MiB."""
        if self.device == "cuda":
            step = self.step(name)
            torch.cuda.reset_peak_memory_stats()
            _ = [step() for _ in range(3)]
            print(json.dumps(torch.cuda.max_memory_allocated() / MIB))
            return
        idle = psutil.Process().memory_info().rss
        step = self.step(name)
        _ = [step() for _ in range(3)]
        print(json.dumps((peak_resident() - idle) / MIB))

    def peaks(self) -> dict[str, float]:
        """MiB of each contender."""
        found = {}
        for name in self.contenders:
            child = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
            found[name] = json.loads(
                subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            )
        return found

    def measure(self) -> Measurement:
        """All rows."""
        peaks = self.peaks()
        timings = alternate({name: self.step(name) for name in self.contenders}, self.rounds)
        first = self.contenders[0]
        rows = []
        for name in self.contenders:
            rows.append(
                {
                    "contender": name,
                    "median ms": 1e3 * timings[name].median,
                    "least ms": 1e3 * timings[name].least,
                    f"× {first}": timings[name].median / timings[first].median,
                    "peak MiB": peaks[name],
                    f"memory × {first}": peaks[name] / peaks[first],
                    "parameters M": count_parameters(self.build(name)) / 1e6,
                    "multiply-adds G": count_operations(self.settings(name), CLASSES, 3) / 1e9,
                }
            )
        sizes = "32²/4, width 96, 6 blocks" if self.small else "its own size"
        return Measurement(f"Training step of {self.model}, {sizes}, batch {self.batch}, {self.device}", rows)


if __name__ == "__main__":
    options = tyro.cli(MlpStep, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of is not None:
        options.report_peak(options.peak_of)
    else:
        found = options.measure()
        found.show()
        if options.output is not None:
            found.save(options.output / f"{options.name}.json")
