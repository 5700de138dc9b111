"""How training went: curves, weights along the way, and top-1 over a setting that runs differ in."""

from __future__ import annotations

from collections.abc import Sequence

from karat.analyze import figures
from karat.analyze.analysis import Analysis
from karat.analyze.loading import moments, trajectory
from karat.analyze.subject import Subject
from karat.analyze.sweep import sweep
from karat.analyze.weights import histograms


def analyse_curves(subjects: Sequence[Subject]) -> Analysis:
    """Training loss, evaluation loss and top-1 per epoch."""
    analysis = Analysis("training curves")
    analysis.figures["curves"] = figures.draw_curves({s.label: s.run.history for s in subjects})
    analysis.numbers = {s.label: s.run.history[-1] if s.run.history else {} for s in subjects}
    return analysis


def analyse_weights(subjects: Sequence[Subject]) -> Analysis:
    """Histograms of the weights at the start, middle and end of training, and how far they moved."""
    analysis = Analysis("weights")
    for s in subjects:
        checkpoints = trajectory(s.run.folder)
        found = histograms(checkpoints)
        names, epochs, _ = zip(*moments(checkpoints), strict=True)
        analysis.figures[f"weights-{s.key}"] = figures.draw_histograms(found, names, epochs)
        analysis.figures[f"divergence-{s.key}"] = figures.draw_divergence(found)
        analysis.numbers[s.label] = {kind.kind: [float(value) for value in kind.from_start] for kind in found}
        analysis.arrays |= {f"{s.key}/{kind.kind}": kind.counts for kind in found}
    return analysis


def analyse_sweep(subjects: Sequence[Subject]) -> Analysis:
    """Top-1 over the setting that the runs differ in."""
    results = [(s.run.settings.label, float(s.run.history[-1]["top1"])) for s in subjects if s.run.history]
    found = sweep(results, subjects[0].options.sweep)
    analysis = Analysis(f"sweep over {found.setting}")
    analysis.figures["sweep"] = figures.draw_sweep(found)
    analysis.numbers = {
        "setting": found.setting,
        "values": list(found.values),
        "lines": {name: {"mean": line.mean, "deviation": line.deviation} for name, line in found.lines.items()},
        "reference": found.reference,
    }
    return analysis
