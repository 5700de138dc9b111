"""The study of Figure 1a: it takes the folders of comparisons as well as of runs, and opens no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from karat.analyze import figures
from karat.analyze.peers import measured_points, published_points
from karat.analyze.study import Study

PEERS = "peers"


def study_peers(folders: Sequence[Path]) -> Study:
    """Parameters against accuracy of measured runs, the published models over them (the paper's Figure 1a).

    Raises ValueError for a folder that holds neither a comparison nor a finished run.
    """
    measured, published = measured_points(folders), published_points()
    study = Study("parameters against accuracy")
    study.figures["parameters-accuracy"] = figures.draw_parameters_accuracy(measured, published)
    study.numbers = {"measured": [asdict(p) for p in measured], "published": [asdict(p) for p in published]}
    return study
