"""Kolmogorov-Arnold Attention for vision transformers."""

from karat.models.create import create_model
from karat.models.karatize import karatize
from karat.models.record import record
from karat.models.resample import resample_tokens
from karat.models.sequence import CrossAttention, SequenceAttention
from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator, karat_operators
from karat.operator.simplex import simplex_projection
from karat.operator.token_grid import resample_operator
from karat.ops import basis_attention
from karat.share.hub import KArAtModel, from_pretrained

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
