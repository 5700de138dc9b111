"""A training step with each KAN in the MLP's place against the plain MLP: time, memory, parameters, multiply-adds.

python benchmarks/mlp_step.py --threads 2 --output docs/results/performance
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import tyro

from karat import create_model
from karat.analyze.cost import count_parameters, multiply_adds
from karat.bench.memory import MIB, peak
from karat.bench.results import Rows
from karat.bench.step import step_of
from karat.bench.timing import alternate


@dataclass(frozen=True)
class MlpStep:
    """Time and memory of an AdamW step on random images, one row an MLP, all of them in one alternating run."""

    model: str = "vit_tiny_patch16_224"
    """timm's name"""
    attention: str = "softmax"
    """attention of all of them"""
    mlps: tuple[str, ...] = ("mlp", "grkan", "kan", "fourierkan", "fastkan")
    """the MLPs; the first is what the others are compared with"""
    batch: int = 8
    """images"""
    rounds: int = 9
    """counted rounds; the median is quoted"""
    threads: int = 0
    """CPU threads; 0 keeps torch's own choice"""
    device: str = "cpu"
    """cpu or cuda"""
    output: Path | None = None
    """folder for mlp_step.json; nothing is written without it"""
    peak_of: str | None = None
    """measure only the memory of this MLP, in this process; the script calls itself so"""

    def step(self, mlp: str):  # type: ignore[no-untyped-def]
        """A closure that does one step."""
        torch.manual_seed(0)
        model = create_model(self.model, attention=self.attention, mlp=mlp, num_classes=10)
        return step_of(model, self.batch, device=self.device)

    def report_peak(self, mlp: str) -> None:
        """In a process of its own: print the peak of three steps above the idle process, MiB."""
        if self.device == "cuda":
            step = self.step(mlp)
            torch.cuda.reset_peak_memory_stats()
            _ = [step() for _ in range(3)]
            print(json.dumps(torch.cuda.max_memory_allocated() / MIB))
            return
        idle = psutil.Process().memory_info().rss
        step = self.step(mlp)
        _ = [step() for _ in range(3)]
        print(json.dumps((peak() - idle) / MIB))

    def peaks(self) -> dict[str, float]:
        """MiB of each MLP."""
        found = {}
        for mlp in self.mlps:
            child = [sys.executable, __file__, *sys.argv[1:], "--peak-of", mlp]
            found[mlp] = json.loads(
                subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            )
        return found

    def measure(self) -> Rows:
        """All rows."""
        peaks = self.peaks()
        timings = alternate({mlp: self.step(mlp) for mlp in self.mlps}, self.rounds)
        first = self.mlps[0]
        rows = []
        for mlp in self.mlps:
            model = create_model(self.model, attention=self.attention, mlp=mlp, num_classes=10)
            rows.append(
                {
                    "mlp": mlp,
                    "median ms": 1e3 * timings[mlp].median,
                    "least ms": 1e3 * timings[mlp].least,
                    f"× {first}": timings[mlp].median / timings[first].median,
                    "peak MiB": peaks[mlp],
                    f"memory × {first}": peaks[mlp] / peaks[first],
                    "parameters M": count_parameters(model) / 1e6,
                    "multiply-adds G": multiply_adds(model, torch.zeros(1, 3, *model.patch_embed.img_size)) / 1e9,  # type: ignore[union-attr, misc]
                }
            )
        return Rows(f"Training step of {self.model}, {self.attention}, batch {self.batch}, {self.device}", rows)


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
            found.save(options.output / "mlp_step.json")
