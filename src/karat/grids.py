"""`karat.operator.grids` under its old path."""

from karat.operator.grids import on_grid

__all__ = ["on_grid"]
