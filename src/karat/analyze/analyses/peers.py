"""Figure 1a: it takes the folders of comparisons as well as of runs, and opens no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from karat.analyze import figures
from karat.analyze.analysis import Analysis
from karat.analyze.peers import measured_points, published_points


def analyse_peers(folders: Sequence[Path]) -> Analysis:
    """Parameters against accuracy of measured runs, the published models over them (the paper's Figure 1a).

    Raises ValueError for a folder that holds neither a comparison nor a finished run.
    """
    measured, published = measured_points(folders), published_points()
    analysis = Analysis("parameters against accuracy")
    analysis.figures["parameters-accuracy"] = figures.draw_parameters_accuracy(measured, published)
    analysis.numbers = {"measured": [asdict(p) for p in measured], "published": [asdict(p) for p in published]}
    return analysis
