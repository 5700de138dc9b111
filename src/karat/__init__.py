"""Kolmogorov-Arnold Attention for vision transformers."""

from karat.config import KArAtConfig
from karat.convert import karat_operators, karatize
from karat.hub import KArAtModel, from_pretrained
from karat.models import create_model
from karat.operator import KArAtOperator
from karat.ops import basis_attention
from karat.record import record
from karat.resample import resample_operator, resample_tokens
from karat.simplex import simplex_projection

__all__ = [
    "KArAtConfig",
    "KArAtModel",
    "KArAtOperator",
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
