"""`karat.share.hub.runs` under its old path."""

from karat.share.hub.runs import from_run, open_model

__all__ = ["from_run", "open_model"]
