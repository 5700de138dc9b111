"""From softmax to learnable attention: operators fitted to the attention that they replace.

`fit_operators` in closed form, block by block; `distill` by gradient, where parameters don't enter linearly or images
are plenty; `measure_blocks` says how near the student came.
"""

from karat.models.distill.closed_form import Rows, fit_operator
from karat.models.distill.fit import FitOptions, fit_operators
from karat.models.distill.layerwise import DistillOptions, distill
from karat.models.distill.measure import BlockReport, measure_blocks

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
