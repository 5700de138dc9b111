"""`karat.share.hub.config` under its old path."""

from karat.share.hub.config import ModelConfig

__all__ = ["ModelConfig"]
