"""`karat bench op|step|memory|scaling|throughput|cost`: options, and what is printed and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from karat.errors import parse
from karat.operator.config import KArAtConfig
from karat.study.bench import attention, memory, paper_way, step, throughput
from karat.study.bench.attention import AttentionShape
from karat.study.bench.measurement import Measurement
from karat.study.bench.timing import Timing, against_softmax
from karat.values import Count, Folder, Natural, Processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark runs and where its results go."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cpu or cuda"""
    threads: Processes = 0
    """CPU threads; 0 keeps torch's own choice"""
    output: Folder | None = None
    """folder for the JSON and the figure; nothing is written without it"""

    def prepare(self) -> None:
        """Set the threads. Raises ValueError for values that can't be."""
        lists = [name for name, value in vars(self).items() if isinstance(value, tuple)]
        if lists and not any(getattr(self, name) for name in lists):
            raise ValueError(f"there is nothing to measure: name something behind --{' or --'.join(lists)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda is not there; choose cpu")
        if self.threads:
            torch.set_num_threads(self.threads)

    def keep(self, rows: Measurement, name: str, draw: Callable[[Measurement, Path], None]) -> None:
        """Show the rows and, if there is a folder, write NAME.json and NAME.png there."""
        rows.show()
        if self.output is not None:
            rows.save(self.output / f"{name}.json")
            draw(rows, self.output / f"{name}.png")


@dataclass(frozen=True)
class TimedBenchmark(Benchmark):
    """Options of all benchmarks that are timed."""

    rounds: Count = 15
    """counted rounds; the median is quoted"""


def _bars(value: str, *groups: str) -> Callable[[Measurement, Path], None]:
    return lambda rows, path: rows.bars(path, value, "way", groups)


def _curves(rows: Measurement, path: Path) -> None:
    rows.draw(path, "value", "median ms", "way")


def _timing_rows(head: dict[str, Any], timings: dict[str, Timing]) -> list[dict[str, Any]]:
    ratios = against_softmax(timings)
    return [
        {**head, "way": way, "median ms": 1e3 * t.median, "least ms": 1e3 * t.least, "× softmax": ratios[way]}
        for way, t in timings.items()
    ]


@dataclass(frozen=True)
class Op(TimedBenchmark):
    """Attention alone: softmax eager and SDPA, the paper's way, and every implementation of ours."""

    attention: tuple[str, ...] = ("g1b", "g3b", "g3b,residual=softmax", "g3b,residual=softmax")
    """learnable attentions, by short name"""
    heads: tuple[Count, ...] = (12, 3, 3, 6)
    """heads of each attention, in the same order"""
    batch: Count = 8
    """images"""
    tokens: Count = 197
    """tokens"""
    head_dim: Count = 64
    """width of a head"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 or bfloat16"""

    def run(self) -> None:
        if len(self.heads) != len(self.attention):
            raise ValueError(
                f"--heads and --attention must be equally many, got {len(self.heads)} and {len(self.attention)}"
            )
        rows = []
        for name, heads in zip(self.attention, self.heads, strict=True):
            shape = AttentionShape(self.batch, heads, self.tokens, self.head_dim)
            for backward in (False, True):
                head = {"attention": name, "H": heads, "pass": "forward+backward" if backward else "forward"}
                timings = attention.measure(
                    shape, name, rounds=self.rounds, device=self.device, dtype=DTYPES[self.dtype], backward=backward
                )
                rows += _timing_rows(head, timings)
        title = f"attention alone, B={self.batch}, N={self.tokens}, D={self.head_dim}, {self.dtype}"
        self.keep(Measurement(title, rows), "op", _bars("median ms", "attention", "H", "pass"))


def _models(names: Sequence[str], paper: bool = False) -> list[tuple[str, str, str]]:
    unknown = [name for name in names if name not in step.PAIRS]
    if unknown:
        raise ValueError(f"unknown model {unknown[0]!r}; choose from {', '.join(step.PAIRS)}")
    pairs = [(name, *step.PAIRS[name]) for name in names]
    for name, _, short in pairs:
        lacking = paper_way.missing(KArAtConfig.parse(short)) if paper else []
        if lacking:
            raise ValueError(
                f"{name} can't be measured beside the paper's way, which has no {lacking[0]}; leave it out"
            )
    return pairs


@dataclass(frozen=True)
class ModelBenchmark(TimedBenchmark):
    """Options of those that time whole models."""

    models: tuple[str, ...] = ("tiny", "small", "base")
    """which of tiny, small, base, tiny-residual, small-residual, tiny-recommended"""
    batch: Count = 16
    """images a batch"""
    bf16: bool = False
    """bfloat16 autocast"""

    @property
    def amp(self) -> torch.dtype | None:
        """The precision of autocast."""
        return torch.bfloat16 if self.bf16 else None


@dataclass(frozen=True)
class Step(ModelBenchmark):
    """A whole training step (AdamW) of ViT-Tiny+G3B, Small+G3B, Base+G1B against timm's two softmax paths."""

    paper: bool = False
    """time the paper's way as well"""

    def run(self) -> None:
        rows = []
        for size, name, short in _models(self.models, paper=self.paper):
            timings = step.measure(
                name,
                short,
                batch=self.batch,
                rounds=self.rounds,
                device=self.device,
                amp=self.amp,
                materialised=self.paper,
            )
            rows += _timing_rows({"model": f"{size}+{short}"}, timings)
        title = f"training step, 224², batch {self.batch}{', bfloat16 autocast' * self.bf16}"
        self.keep(Measurement(title, rows), "step", _bars("median ms", "model"))


@dataclass(frozen=True)
class Memory(Benchmark):
    """Peak memory of a training step, against SDPA and the paper's way.

    On a CPU the process's, above the idle process; on a GPU the allocator's, in bfloat16 autocast.
    """

    models: tuple[str, ...] = ("tiny", "small", "base")
    """which of tiny, small, base"""
    batch: Count = 16
    """images a step"""

    def run(self) -> None:
        rows = []
        for size, name, short in _models(self.models, paper=True):
            peaks = {
                way: memory.measure(name, short, way, batch=self.batch, device=self.device)
                for way in ("softmax SDPA", "karat", "paper's way")
            }
            rows += [
                {
                    "model": f"{size}+{short}",
                    "way": way,
                    "model MiB": peak.model,
                    "peak MiB": peak.step,
                    "× SDPA": peak.step / peaks["softmax SDPA"].step,
                    "× paper's way": peak.step / peaks["paper's way"].step,
                }
                for way, peak in peaks.items()
            ]
        title = f"peak memory of a training step above the idle process, 224², batch {self.batch}"
        self.keep(Measurement(title, rows), "memory", _bars("peak MiB", "model"))


@dataclass(frozen=True)
class Scaling(TimedBenchmark):
    """Forward+backward of attention alone over N, G and R."""

    tokens: tuple[Count, ...] = (65, 197, 785, 3137)
    """N, at G=3, R=12"""
    grids: tuple[Count, ...] = (1, 3, 5, 11)
    """G, at N=197, R=12"""
    ranks: tuple[Count, ...] = (2, 4, 12, 24)
    """R, at N=197, G=3"""
    batch: Count = 2
    """images"""
    heads: Count = 3
    """heads"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 or bfloat16"""
    most_materialised: Natural = 800
    """the paper's way is left out above this many tokens: it needs M·N·(2+3G) numbers a head"""

    def run(self) -> None:
        points = [("N", N, N, 3, 12) for N in self.tokens]
        points += [("G", G, 197, G, 12) for G in self.grids] + [("R", R, 197, 3, R) for R in self.ranks]
        rows = []
        for axis, value, N, G, R in points:
            timings = attention.measure(
                AttentionShape(self.batch, self.heads, N),
                f"g{G}b,rank={R}",
                rounds=self.rounds,
                device=self.device,
                dtype=DTYPES[self.dtype],
                materialised=self.most_materialised >= N,
            )
            rows += _timing_rows({"axis": axis, "value": value}, timings)
        for axis in ("N", "G", "R"):
            some = [row for row in rows if row["axis"] == axis]
            if some:
                title = f"attention forward+backward over {axis}, B={self.batch}, H={self.heads}"
                self.keep(Measurement(title, some), f"scaling-{axis}", _curves)


@dataclass(frozen=True)
class Throughput(ModelBenchmark):
    """Inference of whole models, images a second."""

    def run(self) -> None:
        rows = []
        for size, name, short in _models(self.models):
            timings = throughput.measure(
                name, short, batch=self.batch, rounds=self.rounds, device=self.device, amp=self.amp
            )
            for row in _timing_rows({"model": f"{size}+{short}"}, timings):
                rows.append({**row, "images/s": 1e3 * self.batch / row["median ms"]})
        self.keep(Measurement(f"inference, 224², batch {self.batch}", rows), "throughput", _bars("images/s", "model"))


@dataclass(frozen=True)
class CostBenchmark:
    """Parameters and multiply-adds of the paper's nine models, as run here, beside the published figures."""

    output: Folder | None = None
    """folder for the JSON; nothing is written without it"""

    def run(self) -> None:
        from karat.analyze import cost

        costs = cost.cost_table()
        cost.print_cost_table(costs)
        if self.output is not None:
            Measurement("cost at 224²", [asdict(row) for row in costs]).save(self.output / "cost.json")


BENCHMARKS: dict[str, type[Any]] = {
    "op": Op,
    "step": Step,
    "memory": Memory,
    "scaling": Scaling,
    "throughput": Throughput,
    "cost": CostBenchmark,
}


def bench(arguments: Sequence[str]) -> None:
    """`karat bench NAME [options]`."""
    benchmark = parse(
        lambda: tyro.extras.subcommand_cli_from_dict(dict(BENCHMARKS), prog="karat bench", args=list(arguments)),
        "karat bench",
    )
    if isinstance(benchmark, Benchmark):
        benchmark.prepare()
    benchmark.run()
