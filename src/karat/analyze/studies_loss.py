"""Studies of the loss around trained weights, without parts of them, and of what a model costs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from karat import runs
from karat.analyze import figures
from karat.analyze.ablation import ablate
from karat.analyze.cost import PUBLISHED, bytes_kept, images_per_second
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
from karat.analyze.study import Study, Subject
from karat.analyze.trajectory import Direction, Plane, principal_plane
from karat.models.flops import count_parameters, multiply_adds, operator_parameters, teacher_multiply_adds
from karat.models.transfer import teacher_of
from karat.runs.classification import Settings
from karat.runs.files import digest
from karat.runs.model import build_model

FOLDER = "analysis"
COST_BATCH = 8


def study_ablation(subjects: Sequence[Subject]) -> Study:
    """Top-1 and loss with parts of the learned attention taken away."""
    study = Study("learned attention taken away")
    found = {}
    for s in subjects:
        samples = s.loss_samples
        try:
            found[s.label] = ablate(s.model, samples.images, samples.labels)
        except ValueError as error:
            if len(subjects) == 1:
                raise
            study.notes.append(f"{s.label}: {error}")
            continue
        study.numbers[s.label] = {
            "images": len(samples.labels),
            "split": s.options.split,
            "kept": {name: vars(outcome) for name, outcome in found[s.label].items()},
        }
    if not found:
        raise ValueError("; ".join(study.notes))
    study.figures["ablation"] = figures.draw_ablation(found)
    return study


def study_landscape(subjects: Sequence[Subject]) -> Study:
    """The loss on a plane through the trained weights, with the path that led there, and sharpness as numbers.

    Points are kept in RUN/analysis/landscape-*.jsonl: an interrupted landscape goes on where it stopped.
    """
    study = Study("loss landscape")
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
        study.numbers[s.label] = numbers
        study.arrays |= {f"{s.key}/{name}": getattr(surface, name) for name in ("x", "y", "loss", "top1")}
    study.figures["surface"] = figures.draw_surface(surfaces)
    study.figures["contours"] = figures.draw_contours(surfaces, planes)
    return study


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


def study_hessian(subjects: Sequence[Subject]) -> Study:
    """Top eigenvalues and trace of the loss's Hessian: sharpness as numbers."""
    study = Study("curvature")
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
        study.numbers[s.label] = {
            "eigenvalues": found.eigenvalues.tolist(),
            "trace": found.trace,
            "trace_standard_error": found.trace_error,
            "images": len(samples.labels),
        }
        rows[s.label] = {"largest eigenvalue": float(found.eigenvalues.max()), "trace": found.trace}
    study.figures["curvature"] = figures.draw_cost(rows)
    return study


def _has_softmax_twin(s: Subject, subjects: Sequence[Subject]) -> bool:
    """Whether one of the subjects is the same model with softmax."""
    asked = dataclasses.replace(s.run.settings, attention="softmax", teacher=None)
    return any(_builds(other.run.settings) == _builds(asked) for other in subjects)


def _builds(settings: Settings) -> tuple[object, ...]:
    """What makes the model."""
    return settings.model, settings.attention, settings.teacher, settings.mlp, settings.model_kwargs()


def study_cost(subjects: Sequence[Subject]) -> Study:
    """Parameters, multiply-adds, memory and speed of each run beside the same model with softmax."""
    study = Study("cost")
    rows: dict[str, dict[str, float]] = {}
    for s in subjects:
        settings, facts = s.run.settings, s.run.facts
        published_size = not settings.model_kwargs()
        reference = "the same with softmax" if len(subjects) == 1 else f"{s.label} with softmax"
        twin = dataclasses.replace(settings, attention="softmax", teacher=None)
        for label, asked in ((s.label, settings), (reference, twin)):
            if label == reference and _has_softmax_twin(s, subjects):
                continue
            model = build_model(asked, int(facts["num_classes"]), int(facts["in_chans"]), s.run.folder)
            images = s.samples.images[:1].expand(COST_BATCH, -1, -1, -1).contiguous()
            rows[label] = {
                "parameters (M)": count_parameters(model) / 1e6,
                "of them in the operator (M)": operator_parameters(model) / 1e6,
                "multiply-adds an image (M)": multiply_adds(model, images[:1]) / 1e6,
                f"kept for backward, batch {COST_BATCH} (MiB)": bytes_kept(model, images) / 2**20,
                "images/s, inference here": images_per_second(model, images),
            }
            teacher = teacher_of(model)
            if teacher is not None:  # it looks at every image too, and its parameters aren't among the student's
                rows[label] |= {
                    "the frozen teacher: parameters (M)": count_parameters(teacher) / 1e6,
                    "of the multiply-adds, the teacher's (M)": teacher_multiply_adds(model, images[:1]) / 1e6,
                }
            published = PUBLISHED.get((asked.model, asked.attention)) if teacher is None else None
            if published is not None and published_size:
                rows[label] |= {
                    "paper: parameters (M)": published["params_M"],
                    "paper: multiply-adds an image (G)": published["GFLOPs"],
                    "paper: GPU memory, batch 32 (GB)": published["gpu_memory_GB_batch32"],
                }
            history = s.run.history
            if label == s.label and history:
                seconds = sum(line["seconds"] for line in history) / len(history)
                rows[label] |= {
                    "seconds an epoch, in training": seconds,
                    "peak memory in training (MiB)": max(line["peak_memory_mib"] for line in history),
                }
    study.numbers = dict(rows)
    study.figures["cost"] = figures.draw_cost(rows)
    return study
