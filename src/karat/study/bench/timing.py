"""Timing that can be trusted on a noisy machine: alternate the candidates in one run, quote medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over all rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Call all candidates in turn, `rounds` times, and time each call in seconds.

    The order is reversed in every other round, so that none always follows the same neighbour. On a GPU every call
    is waited for.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            synchronise()
            start = time.perf_counter()
            candidates[name]()
            synchronise()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def against_softmax(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Each candidate's median over that of the fastest whose name begins with "softmax"."""
    fastest = min(timing.median for name, timing in timings.items() if name.startswith("softmax"))
    return {name: timing.median / fastest for name, timing in timings.items()}


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict[str, str | int]:
    """Chip, versions and threads: what a figure must be read with."""
    return {
        "chip": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
