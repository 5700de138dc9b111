"""`karat.share.hub` under its old path."""

from karat.share.hub import KArAtModel, ModelConfig, from_pretrained

__all__ = ["KArAtModel", "ModelConfig", "from_pretrained"]
