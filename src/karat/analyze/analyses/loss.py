"""The loss around trained weights: a landscape with the path that led there, and curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from karat import runs
from karat.analyze import figures
from karat.analyze.analysis import FOLDER, Analysis
from karat.analyze.directions import random_directions
from karat.analyze.hessian import curvature
from karat.analyze.landscape import (
    Surface,
    axes_around,
    axis_through_zero,
    cache_key,
    evaluate,
    loss_surface,
    losses_at,
    sharpness,
)
from karat.analyze.loading import trajectory
from karat.analyze.subject import Subject
from karat.analyze.trajectory import Direction, Plane, principal_plane
from karat.runs.files import digest


def analyse_landscape(subjects: Sequence[Subject]) -> Analysis:
    """The loss on a plane through the trained weights, with the path that led there, and sharpness as numbers.

    Points are kept in RUN/analysis/landscape-*.jsonl: an interrupted landscape goes on where it stopped.
    """
    analysis = Analysis("loss landscape")
    surfaces: dict[str, Surface] = {}
    planes: dict[str, Plane | None] = {}
    for s in subjects:
        directions, plane = _plane(s)
        surface = _surface(s, directions, plane)
        surfaces[s.label], planes[s.label] = surface, plane
        samples = s.loss_samples
        numbers: dict[str, Any] = {
            "loss": evaluate(s.model, samples.images, samples.labels)[0],
            "images": len(samples.labels),
            "split": s.options.split,
            **sharpness(surface),
        }
        if plane is not None:
            numbers |= {
                "explained_variance": plane.explained.tolist(),
                "epochs": list(plane.epochs),
                "path": plane.coordinates.tolist(),
                "distance_from_plane": plane.distances.tolist(),
                "loss_below_path": losses_at(
                    s.model, directions, plane.coordinates, samples.images, samples.labels
                ).tolist(),
            }
        analysis.numbers[s.label] = numbers
        analysis.arrays |= {f"{s.key}/{name}": getattr(surface, name) for name in ("x", "y", "loss", "top1")}
    analysis.figures["surface"] = figures.draw_surface(surfaces)
    analysis.figures["contours"] = figures.draw_contours(surfaces, planes)
    return analysis


def _plane(s: Subject) -> tuple[tuple[Direction, Direction], Plane | None]:
    if s.options.directions == "random":
        return random_directions(s.model, seed=s.options.seed), None
    centre = {name: p.detach() for name, p in s.model.named_parameters() if p.requires_grad}
    plane = principal_plane(trajectory(s.run.folder), centre)
    return plane.directions, plane


def _surface(s: Subject, directions: tuple[Direction, Direction], plane: Plane | None) -> Surface:
    options, samples = s.options, s.loss_samples
    if plane is None:
        x = y = axis_through_zero(-options.reach, options.reach, options.points)
        path = ""
    else:
        x, y = axes_around(plane.coordinates, options.points)
        path = cache_key(path=plane.coordinates.tolist())
    key = cache_key(
        weights=digest(runs.weights_path(s.run.folder, options.weights)),
        path=path,
        seed=options.seed if plane is None else None,
        x=x.tolist(),
        y=y.tolist(),
        images=_digest(samples.images),
        labels=_digest(samples.labels),
    )
    cache = s.run.folder / FOLDER / f"landscape-{key}.jsonl"
    return loss_surface(s.model, directions, x, y, samples.images, samples.labels, cache=cache, progress=s.progress)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def analyse_hessian(subjects: Sequence[Subject]) -> Analysis:
    """Top eigenvalues and trace of the loss's Hessian: sharpness as numbers."""
    analysis = Analysis("curvature")
    rows = {}
    for s in subjects:
        options = s.options
        samples = s.run.samples(options.hessian_samples, options.split)
        found = curvature(
            s.model,
            samples.images,
            samples.labels,
            count=options.eigenvalues,
            samples=options.probes,
            seed=options.seed,
        )
        analysis.numbers[s.label] = {
            "eigenvalues": found.eigenvalues.tolist(),
            "trace": found.trace,
            "trace_standard_error": found.trace_error,
            "images": len(samples.labels),
        }
        rows[s.label] = {"largest eigenvalue": float(found.eigenvalues.max()), "trace": found.trace}
    analysis.figures["curvature"] = figures.draw_cost(rows)
    return analysis
