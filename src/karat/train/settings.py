"""`karat.runs.classification` under its old path."""

from karat.runs.classification import Settings

__all__ = ["Settings"]
