"""What `karat analyze` can look at in runs, by name: each takes opened runs and returns figures, arrays and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from karat.analyze.analyses.attention import analyse_attention, analyse_spectrum
from karat.analyze.analyses.cost import analyse_cost
from karat.analyze.analyses.learned import analyse_ablation, analyse_functions, analyse_parts
from karat.analyze.analyses.loss import analyse_hessian, analyse_landscape
from karat.analyze.analyses.training import analyse_curves, analyse_sweep, analyse_weights
from karat.analyze.analysis import Analysis
from karat.analyze.subject import Subject

ANALYSES: dict[str, Callable[[Sequence[Subject]], Analysis]] = {
    "curves": analyse_curves,
    "cost": analyse_cost,
    "attention": analyse_attention,
    "spectrum": analyse_spectrum,
    "functions": analyse_functions,
    "parts": analyse_parts,
    "ablation": analyse_ablation,
    "weights": analyse_weights,
    "landscape": analyse_landscape,
    "hessian": analyse_hessian,
    "sweep": analyse_sweep,
}
