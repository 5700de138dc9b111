"""`karat.models.distill` under its old path."""

from karat.models.distill import (
    BlockReport,
    DistillOptions,
    FitOptions,
    Rows,
    distill,
    fit_operator,
    fit_operators,
    measure_blocks,
)

__all__ = [
    "BlockReport",
    "DistillOptions",
    "FitOptions",
    "Rows",
    "distill",
    "fit_operator",
    "fit_operators",
    "measure_blocks",
]
