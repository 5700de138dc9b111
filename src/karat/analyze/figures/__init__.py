"""Pictures of the arrays that `karat.analyze` gives: each function takes arrays and returns a matplotlib Figure.

Save one with `save(figure, "name.svg")`; the ending chooses PNG, SVG or PDF.
"""

from karat.analyze.figures.attention import draw_heads, draw_maps, draw_matrices, draw_regions, draw_spectra
from karat.analyze.figures.learned import draw_ablation, draw_coefficients, draw_functions, draw_parts
from karat.analyze.figures.loss import draw_contours, draw_surface
from karat.analyze.figures.peers import draw_parameters_accuracy
from karat.analyze.figures.training import (
    draw_averaging,
    draw_cost,
    draw_curves,
    draw_divergence,
    draw_histograms,
    draw_sweep,
)
from karat.plots import FORMATS, encode, save
