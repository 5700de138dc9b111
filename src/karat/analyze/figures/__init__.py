"""Pictures of the arrays that `karat.analyze` gives: each function takes arrays and returns a matplotlib Figure.

Save one with `save(figure, "name.svg")`; the ending chooses PNG, SVG or PDF.
"""

from karat.analyze.figures.ablation import draw_ablation
from karat.analyze.figures.attention import draw_heads, draw_maps, draw_matrices, draw_regions
from karat.analyze.figures.functions import draw_coefficients, draw_functions
from karat.analyze.figures.landscape import draw_contours, draw_surface
from karat.analyze.figures.parts import draw_parts
from karat.analyze.figures.peers import draw_parameters_accuracy
from karat.analyze.figures.spectrum import draw_spectra
from karat.analyze.figures.training import draw_cost, draw_curves, draw_divergence, draw_histograms, draw_sweep
from karat.plots import FORMATS, encode, save

__all__ = [
    "FORMATS",
    "draw_ablation",
    "draw_coefficients",
    "draw_contours",
    "draw_cost",
    "draw_curves",
    "draw_divergence",
    "draw_functions",
    "draw_heads",
    "draw_histograms",
    "draw_maps",
    "draw_matrices",
    "draw_parameters_accuracy",
    "draw_parts",
    "draw_regions",
    "draw_spectra",
    "draw_surface",
    "draw_sweep",
    "encode",
    "save",
]
