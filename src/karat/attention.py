"""`karat.models.attention` under its old path."""

from karat.models.attention import KArAtAttention

__all__ = ["KArAtAttention"]
