"""`karat.models.karatize` under its old path."""

from karat.models.karatize import karatize

__all__ = ["karatize"]
