"""One self-contained HTML page about one or several runs: it opens offline and asks nothing of the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined

from karat.analyze.analyses import analysis_of
from karat.analyze.analysis import Analysis, as_json
from karat.analyze.figures import encode
from karat.analyze.loading import trajectory
from karat.analyze.subject import Options, Subject, open_subjects, shown_settings
from karat.runs.files import write_text

REPORT = "report.html"
# Larger drawings are embedded as pixels: a browser is slow with ten thousands of strokes.
MOST_SVG_BYTES = 200_000
# Narrower figures stay readable at half of the page's width.
MOST_HALF_INCHES = 8.0

# What the page shows, in order, with a sentence on how to read it.
SECTIONS: dict[str, str] = {
    "curves": "Loss on the training images (with augmentation and smoothing) and on the evaluation images.",
    "cost": "Multiply-adds are those of all matrix products of one image's forward pass, as run here.",
    "attention": "What the class token looks at in the chosen block, head by head (negative values clipped; without a "
    "class token the mean over all patches), and the flow through all blocks. Outlined: the fewest patches that hold "
    "half of the dominant head's mass; that head is the one whose map has the largest energy.",
    "spectrum": "Singular values of scores A and of attention σ(A): mean over heads and images, least to greatest "
    "shaded; dots mark the break of the scree plot.",
    "functions": "Edge functions over the range of scores that occurs (mean ± 3 deviations). Coloured: the strongest "
    "edges of a head with the nearest simple formula (dotted) and its error, as a share of the function's deviation.",
    "parts": "What the learned part of attention consists of, by power: a row that is the same for all queries and "
    "images, what each query's place adds to it, and what follows the image through the scores; beside softmax of the "
    "same scores. Below: its size against softmax (gate included) and the gates.",
    "weights": "How the weights are spread at the start, the middle and the end, and the Jensen-Shannon divergence "
    "from the start.",
    "landscape": "Loss on a fixed subset of images without augmentation, on a plane through the trained weights "
    "(white dot). Along the path: the two main directions of the checkpoints; otherwise random directions, scaled "
    "filter by filter.",
    "hessian": "Top eigenvalues and trace of the loss's Hessian on a small subset of images: larger is sharper.",
}
TITLES = {"hessian": "curvature", "functions": "edge functions"}  # of sections that have nothing to show


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as the page holds it."""

    name: str
    source: str  # a data: address
    half: bool  # two of them fit beside each other


def build_report(
    subjects: Sequence[Subject],
    *,
    sections: Sequence[str] = tuple(SECTIONS),
    announce: Callable[[str], None] | None = None,
) -> str:
    """The page about opened runs, side by side.

    A section that can't be had (no trajectory checkpoints, no learnable attention) says so in its place. Where a run
    has no path, its landscape is drawn along random directions.

    Raises ValueError for an unknown section.
    """
    unknown = next((name for name in sections if name not in SECTIONS), None)
    if unknown is not None:
        raise ValueError(f"unknown section {unknown!r}; choose from {', '.join(SECTIONS)}")
    made = []
    for name in sections:
        if announce:
            announce(name)
        made.append(_section(name, subjects))
    page = resources.files("karat.analyze").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["differs"] = lambda cells: len(set(cells)) > 1
    return environment.from_string(page).render(
        title=", ".join(s.label for s in subjects),
        labels=[s.label for s in subjects],
        results=_results(subjects),
        settings=shown_settings(subjects),
        sections=made,
        version=metadata.version("karat"),
    )


def write_report(
    folders: Sequence[Path],
    options: Options,
    *,
    output: Path | None = None,
    sections: Sequence[str] = tuple(SECTIONS),
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the page about some runs to `output`, by default report.html in the first folder; its path."""
    subjects = open_subjects(folders, options, progress)
    path = folders[0] / REPORT if output is None else output
    page = build_report(subjects, sections=sections, announce=announce)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _section(name: str, subjects: Sequence[Subject]) -> dict[str, Any]:
    """One analysis on the page, as the page's template names its parts."""
    try:
        analysis = _landscape(subjects) if name == "landscape" else analysis_of(name)(subjects)
    except ValueError as error:
        analysis = Analysis(name, notes=[str(error)])
    title = analysis.title if analysis.figures else TITLES.get(name, name)
    return {
        "name": name,
        "title": title,
        "text": SECTIONS[name],
        "pictures": _pictures(analysis, subjects),
        "notes": analysis.notes,
        "numbers": json.dumps(as_json(analysis.numbers, 6), indent=1, ensure_ascii=False) if analysis.numbers else "",
    }


def _pictures(analysis: Analysis, subjects: Sequence[Subject]) -> list[list[EmbeddedFigure]]:
    """The figures by kind: one that each run has stands beside those of the others."""
    kinds: dict[str, list[EmbeddedFigure]] = {}
    for name, figure in analysis.figures.items():
        ends = [s for s in subjects if name.endswith(f"-{s.key}")]
        run = max(ends, key=lambda s: len(s.key), default=None)  # one key may be the end of another
        half = run is not None and len(subjects) > 1 and figure.get_figwidth() <= MOST_HALF_INCHES
        kind = name if run is None else name.removesuffix(f"-{run.key}")
        title = kind if run is None else f"{kind}, {run.label}"
        kinds.setdefault(kind, []).append(EmbeddedFigure(title.replace("-", " "), _embedded(figure), half))
    return list(kinds.values())


def _landscape(subjects: Sequence[Subject]) -> Analysis:
    missing = []
    for s in subjects:
        try:
            found = trajectory(s.run.folder)
        except ValueError as error:
            missing.append(f"{error}; random directions are drawn instead")
        else:
            if len(found) < 3:
                missing.append(f"{s.run.folder} has only {len(found)} trajectory checkpoints, which span no plane")
    if not missing:
        return analysis_of("landscape")(subjects)
    drawn = [replace(s, options=replace(s.options, directions="random")) for s in subjects]
    analysis = analysis_of("landscape")(drawn)
    analysis.notes += missing
    return analysis


def _embedded(figure: Any) -> str:
    drawing, kind = encode(figure, "svg"), "svg+xml"
    if len(drawing) > MOST_SVG_BYTES:
        drawing, kind = encode(figure, "png", dpi=140), "png"
    return f"data:image/{kind};base64,{base64.b64encode(drawing).decode()}"


def _results(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """What came out, by name: a cell for each run."""

    def cells(told: Callable[[list[dict[str, Any]]], str]) -> list[str]:
        return [told(s.run.history) if s.run.history else "–" for s in subjects]

    return {
        "top-1": cells(lambda history: f"{history[-1]['top1']:.2f} %"),
        "best top-1": cells(lambda history: f"{max(line['top1'] for line in history):.2f} %"),
        "evaluation loss": cells(lambda history: f"{history[-1]['eval_loss']:.4f}"),
        "parameters": [f"{s.run.facts.get('parameters', 0):,}" for s in subjects],
        "epochs": [str(len(s.run.history)) for s in subjects],
        "seconds an epoch": cells(lambda history: f"{fmean(line['seconds'] for line in history):.2f}"),
    }
