"""Kolmogorov-Arnold Attention for vision transformers."""

from karat.config import KArAtConfig
from karat.convert import karatize
from karat.hub import KArAtModel, from_pretrained
from karat.models import create_model
from karat.operator import KArAtOperator, karat_operators
from karat.ops import basis_attention
from karat.record import record
from karat.resample import resample_tokens
from karat.sequence import CrossAttention, SequenceAttention
from karat.simplex import simplex_projection
from karat.token_grid import resample_operator

__all__ = [
    "CrossAttention",
    "KArAtConfig",
    "KArAtModel",
    "KArAtOperator",
    "SequenceAttention",
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
