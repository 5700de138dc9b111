"""The peak memory of this process, measured per run: Linux lets a process reset its own high-water mark."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch


def reset_peak() -> None:
    """Give freed memory back to the system and start a new high-water mark, where the system allows it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return  # another C library, or no permission: the mark then covers the whole process


def peak_resident() -> int:
    """The peak of resident memory in bytes, since `reset_peak` on Linux, of the process's life elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def peak_mib(device: torch.device) -> float:
    """The peak since `reset_peak` in MiB: of the device's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident() / 2**20
