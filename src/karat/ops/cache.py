"""The size of a core's cache, which tiles on a CPU are cut to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

USUAL_BYTES = 1 << 20


def cache_bytes() -> int:
    """Size of one core's second-level cache; 1 MiB where PyTorch doesn't tell."""
    tell: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return int(tell().get("l2_cache_size") or USUAL_BYTES)
