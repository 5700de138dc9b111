"""`karat.runs.model` under its old path."""

from karat.runs.model import build_model, load_run

__all__ = ["build_model", "load_run"]
