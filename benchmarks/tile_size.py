"""Attention forward+backward over tile sizes of the tiled and the C++ implementation.

    python benchmarks/tile_size.py --threads 2

The best one found is TILE_NUMBERS in karat/ops/tiled/attention.py and TILE_BYTES in karat/ops/cpp/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from karat import KArAtOperator
from karat.ops.cpp import task as cpp_task
from karat.ops.tiled import attention as tiled
from karat.study.bench.attention import AttentionShape, eager_softmax, forward_backward
from karat.study.bench.measurement import Measurement
from karat.study.bench.timing import against_softmax, alternate

# (attention, heads): the pairs that the targets speak of.
CASES = (("g1b", 12), ("g3b", 3))


@dataclass(frozen=True)
class TileSize:
    """One row for each implementation and tile size, all of a case in one alternating run."""

    sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """KiB of features in a tile of the C++ kernel; of numbers, in 1024, in one of the tiled implementation"""
    rounds: int = 11
    """counted rounds; the median is quoted"""
    threads: int = 0
    """CPU threads; 0 keeps torch's own choice"""
    output: Path | None = None
    """folder for tile_size.json; nothing is written without it"""

    def run(self) -> None:
        """Measure, print, keep."""
        if self.threads:
            torch.set_num_threads(self.threads)
        rows = []
        for attention, heads in CASES:
            for way, timing in self.measure(attention, heads).items():
                rows.append({"attention": attention, "H": heads, "way": way, **timing})
        result = Measurement("attention forward+backward over tile sizes, B=8, N=197, D=64", rows)
        result.show()
        if self.output is not None:
            result.save(self.output / "tile_size.json")

    def measure(self, attention: str, heads: int) -> dict[str, dict[str, float]]:
        """Milliseconds, and × softmax, of one case."""
        shape = AttentionShape(H=heads)
        q, k, v, grad = torch.randn(4, shape.B, heads, shape.N, shape.D).unbind()
        for x in (q, k, v):
            x.requires_grad_()

        def sized(impl: str, size: int) -> Callable[[], None]:
            attend = KArAtOperator(heads, shape.N, f"{attention},impl={impl}").attend

            def run() -> None:
                if impl == "cpp":
                    cpp_task.TILE_BYTES = size << 10
                else:
                    tiled.TILE_NUMBERS["cpu"] = size << 10
                forward_backward(attend, q, k, v, grad)

            return run

        candidates = {"softmax eager": partial(forward_backward, eager_softmax, q, k, v, grad)}
        for impl in ("tiled", "cpp"):
            candidates |= {f"{impl} {size}": sized(impl, size) for size in self.sizes}
        timings = alternate(candidates, self.rounds)
        ratios = against_softmax(timings)
        return {way: {"median ms": 1e3 * t.median, "× softmax": ratios[way]} for way, t in timings.items()}


if __name__ == "__main__":
    tyro.cli(TileSize).run()
