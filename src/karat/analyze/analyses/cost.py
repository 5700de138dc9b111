"""What runs cost, beside the same models with softmax and the published figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean

from karat.analyze import figures
from karat.analyze.analysis import Analysis
from karat.analyze.cost import PUBLISHED, bytes_kept, images_per_second
from karat.analyze.subject import Subject
from karat.models.flops import count_parameters, multiply_adds, operator_parameters, teacher_multiply_adds
from karat.models.transfer import teacher_of
from karat.runs.classification import Settings
from karat.runs.model import build_model

BATCH = 8
OF_THE_PAPER = {  # metrics of Table 13
    "params_M": "paper: parameters (M)",
    "GFLOPs": "paper: multiply-adds an image (G)",
    "gpu_memory_GB_batch32": "paper: GPU memory, batch 32 (GB)",
}


def analyse_cost(subjects: Sequence[Subject]) -> Analysis:
    """Parameters, multiply-adds, memory and speed of each run beside the same model with softmax."""
    analysis = Analysis("cost")
    rows: dict[str, dict[str, float]] = {}
    for s in subjects:
        settings, facts = s.run.settings, s.run.facts
        published_size = not settings.model_kwargs()
        reference = "the same with softmax" if len(subjects) == 1 else f"{s.label} with softmax"
        twin = dataclasses.replace(settings, attention="softmax", teacher=None)
        twin_is_there = any(_builds(other.run.settings) == _builds(twin) for other in subjects)
        for label, asked in [(s.label, settings), (reference, twin)][: 1 if twin_is_there else 2]:
            model = build_model(asked, int(facts["num_classes"]), int(facts["in_chans"]), s.run.folder)
            images = s.samples.images[:1].expand(BATCH, -1, -1, -1).contiguous()
            rows[label] = {
                "parameters (M)": count_parameters(model) / 1e6,
                "of them in the operator (M)": operator_parameters(model) / 1e6,
                "multiply-adds an image (M)": multiply_adds(model, images[:1]) / 1e6,
                f"kept for backward, batch {BATCH} (MiB)": bytes_kept(model, images) / 2**20,
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
                    words: published[metric] for metric, words in OF_THE_PAPER.items() if metric in published
                }
            history = s.run.history
            if label == s.label and history:
                rows[label] |= {
                    "seconds an epoch, in training": fmean(line["seconds"] for line in history),
                    "peak memory in training (MiB)": max(line["peak_memory_mib"] for line in history),
                }
    analysis.numbers = dict(rows)
    analysis.figures["cost"] = figures.draw_cost(rows)
    return analysis


def _builds(settings: Settings) -> tuple[object, ...]:
    """What makes the model."""
    return settings.model, settings.attention, settings.teacher, settings.mlp, settings.model_kwargs()
