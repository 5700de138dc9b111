"""What `karat analyze` can look at: functions `analyse_NAME` that give figures, arrays and numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Name -> the file here that has its function. Each takes opened runs, but for peers, which takes folders.
ANALYSES = {
    "curves": "training",
    "cost": "cost",
    "attention": "attention",
    "spectrum": "attention",
    "functions": "learned",
    "parts": "learned",
    "ablation": "learned",
    "averaging": "training",
    "weights": "training",
    "landscape": "loss",
    "hessian": "loss",
    "sweep": "training",
    "peers": "peers",
}


def analysis_of(name: str) -> Callable[[Any], Any]:
    """The function of that name, imported when it is asked for."""
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"{__name__}.{ANALYSES[name]}"), f"analyse_{name}")
    return found
