"""Kolmogorov-Arnold Attention for vision transformers.

Public names are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from karat.old_paths import PATHS, OldPaths

if TYPE_CHECKING:
    from karat.models.create import create_model
    from karat.models.karatize import karatize
    from karat.models.layer import attn_layer
    from karat.models.record import record
    from karat.models.resample import resample_tokens
    from karat.models.sequence import CrossAttention, SequenceAttention
    from karat.operator.config import KArAtConfig
    from karat.operator.operator import KArAtOperator, karat_operators
    from karat.operator.simplex import simplex_projection
    from karat.operator.token_grid import resample_operator
    from karat.ops import basis_attention
    from karat.share.hub import KArAtModel, from_pretrained

_HOME = {
    "CrossAttention": "karat.models.sequence",
    "KArAtConfig": "karat.operator.config",
    "KArAtModel": "karat.share.hub",
    "KArAtOperator": "karat.operator.operator",
    "SequenceAttention": "karat.models.sequence",
    "attn_layer": "karat.models.layer",
    "basis_attention": "karat.ops",
    "create_model": "karat.models.create",
    "from_pretrained": "karat.share.hub",
    "karat_operators": "karat.operator.operator",
    "karatize": "karat.models.karatize",
    "record": "karat.models.record",
    "resample_operator": "karat.operator.token_grid",
    "resample_tokens": "karat.models.resample",
    "simplex_projection": "karat.operator.simplex",
}
_ROOMS = ("basis", "ops", "operator", "models", "data", "runs", "train", "share", "detect", "paper", "analyze", "study")

__all__ = [
    "CrossAttention",
    "KArAtConfig",
    "KArAtModel",
    "KArAtOperator",
    "SequenceAttention",
    "attn_layer",
    "basis_attention",
    "create_model",
    "from_pretrained",
    "karat_operators",
    "karatize",
    "record",
    "resample_operator",
    "resample_tokens",
    "simplex_projection",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS or name == "integrations" or f"karat.{name}" in PATHS:
        return importlib.import_module(f"karat.{name}")
    raise AttributeError(f"module 'karat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


sys.meta_path.append(OldPaths())

# timm's create_model knows the karat_* models from here on. The command line, whose --help is to be at once, imports
# them with the command that needs them.
if PurePath(sys.argv[0] if getattr(sys, "argv", None) else "").name not in ("karat", "-m"):
    importlib.import_module("karat.models.create")
