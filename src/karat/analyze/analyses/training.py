"""How training went: curves, weights along the way, and top-1 over a setting that runs differ in."""

from __future__ import annotations

from collections.abc import Sequence

from karat.analyze import figures
from karat.analyze.analysis import Analysis
from karat.analyze.averaging import averaged
from karat.analyze.landscape import evaluate
from karat.analyze.loading import moments, trajectory
from karat.analyze.subject import Subject, shown_settings
from karat.analyze.sweep import sweep
from karat.analyze.weights import histograms
from karat.runs.checkpoint import load_weights
from karat.runs.files import read_tensors

OF_A_RUN = ("attention", "mlp", "seed", "init")  # what its name says, and what each seed has of its own
OF_THE_TASK = ("model", "data", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
EVERY = 4  # epochs from one point of the curve of averaging to the next; the last epoch is one too


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


def analyse_averaging(subjects: Sequence[Subject]) -> Analysis:
    """Top-1 lost by averaging attention over images, along training: at every fourth epoch's weights and the last."""
    analysis = Analysis("attention averaged over images")
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for s, found in analysis.each(subjects, _averaging):
        curves.setdefault(s.run.settings.label, []).append(found)
        analysis.numbers[s.label] = {"images": len(s.loss_samples.labels), "split": s.options.split, "epochs": found}
    analysis.figures["averaging"] = figures.draw_averaging(curves)
    return analysis


def _averaging(s: Subject) -> list[dict[str, float]]:
    """A line an epoch, as in metrics.jsonl."""
    checkpoints, lines, model = trajectory(s.run.folder), [], s.run.model()
    images, labels = s.loss_samples.images, s.loss_samples.labels
    for epoch, path in checkpoints:
        if epoch % EVERY and epoch != checkpoints[-1][0]:
            continue
        load_weights(model, read_tensors(path), str(path))
        loss, top1 = evaluate(model, images, labels)
        mean = averaged(model, images, labels)
        lines.append({"epoch": epoch, "top1": top1, "averaged": mean.top1, "lost": top1 - mean.top1})
        lines[-1] |= {"loss": loss, "averaged_loss": mean.loss}
    return lines


def analyse_sweep(subjects: Sequence[Subject]) -> Analysis:
    """Top-1 over the setting that the runs differ in."""
    trained = [s for s in subjects if s.run.history]
    results = [(s.run.settings.label, float(s.run.history[-1]["top1"])) for s in trained]
    found = sweep(results, subjects[0].options.sweep, _beside(trained))
    analysis = Analysis(f"sweep over {found.setting}")
    analysis.figures["sweep"] = figures.draw_sweep(found)
    analysis.numbers = {
        "setting": found.setting,
        "values": list(found.values),
        "lines": {name: {"mean": line.mean, "deviation": line.deviation} for name, line in found.lines.items()},
        "reference": found.reference,
    }
    return analysis


def _beside(subjects: Sequence[Subject]) -> list[str]:
    """What sets each run apart beside its name: another model or data; among runs of one name, all but the seed."""
    names = [s.run.settings.label for s in subjects]
    apart = dict[str, list[str]]()
    for setting, values in shown_settings(subjects).items():
        among = [""] * len(names) if setting in OF_THE_TASK else names
        if setting not in OF_A_RUN and len(set(zip(among, values, strict=True))) > len(set(among)):
            apart[setting] = values
    return [", ".join(f"{setting} {values[i]}" for setting, values in apart.items()) for i in range(len(names))]
