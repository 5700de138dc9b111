"""What can be looked at in runs, by name: each study takes opened runs and returns figures, arrays and numbers.

The studies of the loss itself (landscape, Hessian) are in `studies_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from karat.analyze import figures
from karat.analyze.attention import (
    BlockAttention,
    check_head,
    choose_block,
    class_maps,
    dominant_regions,
    grid_of,
    region,
    rollout,
    rollout_maps,
    upsample,
)
from karat.analyze.functions import Curves, coefficients, curves, operator_of_block, operators_of, score_range
from karat.analyze.loading import moments, trajectory
from karat.analyze.parts import parts_of
from karat.analyze.quality import box_mask, iou, mass_inside, measures, pointing_game
from karat.analyze.spectrum import spectrum
from karat.analyze.studies_loss import study_ablation, study_cost, study_hessian, study_landscape
from karat.analyze.study import Study, Subject
from karat.analyze.sweep import sweep
from karat.analyze.symbolic import Formula, fit_formula
from karat.analyze.weights import histograms
from karat.data.images import read_file
from karat.operator.config import KArAtConfig

# Panels beyond these make a figure unreadable.
MOST_HEADS, NAMED_EDGES, DRAWN_EDGES, CURVE_POINTS = 6, 3, 40, 201


def _learns(subject: Subject) -> bool:
    return not KArAtConfig.parse(subject.run.settings.attention).is_softmax


def _table(found: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(float(value), 6) for value in values] for name, values in found.items()}


def study_curves(subjects: Sequence[Subject]) -> Study:
    """Training loss, evaluation loss and top-1 per epoch."""
    study = Study("training curves")
    study.figures["curves"] = figures.draw_curves({s.label: s.run.history for s in subjects})
    study.numbers = {s.label: s.run.history[-1] if s.run.history else {} for s in subjects}
    return study


@dataclass(frozen=True)
class _Picked:
    """The dominant head of each image (B,), its map (B,h,w) and the region that it picks, boolean (B,h,w)."""

    subject: Subject
    heads: Tensor
    maps: Tensor
    regions: Tensor


def study_attention(subjects: Sequence[Subject]) -> Study:
    """Maps of the class token, rollout, the region that the dominant head picks, σ of every head, measures."""
    study = Study("attention")
    picked: dict[str, _Picked] = {}
    for s in subjects:
        block = choose_block(s.attention, s.options.block)
        study.numbers[s.label] = {found.name: _table(measures(found.sigma)) for found in s.attention}
        try:
            grid = grid_of(s.model)
            maps = class_maps(block.sigma, grid, signed=s.options.signed)
        except ValueError as error:
            study.notes.append(f"{s.label}: {error}")
            maps = None
        if maps is not None:
            flow = rollout([found.sigma for found in s.attention])
            names = _names(s)
            heads = range(maps.shape[1]) if s.options.head is None else [check_head(s.options.head, maps.shape[1])]
            columns = {f"head {h}": maps[:, h] for h in list(heads)[:MOST_HEADS]}
            columns["rollout"] = rollout_maps(flow, grid)
            title = f"maps-{s.key}"
            study.figures[title] = figures.draw_maps(s.samples.pixels, columns, titles=names)
            dominant, chosen = dominant_regions(maps)
            picked[s.label] = _Picked(s, dominant, maps[torch.arange(len(maps)), dominant], chosen)
            study.arrays |= {f"{s.key}/maps": maps, f"{s.key}/rollout": flow}
            overlap = _overlap(s, maps)
            if overlap:
                study.numbers[s.label]["overlap"] = overlap
        study.figures[f"matrices-{s.key}"] = _matrices(s, block)
        study.figures[f"heads-{s.key}"] = figures.draw_heads(
            {str(index): found.sigma[0] for index, found in enumerate(s.attention)}
        )
        study.arrays |= {f"{s.key}/scores": block.scores, f"{s.key}/sigma": block.sigma}
    for group in _same_images(picked):
        first = picked[group[0]].subject
        title = "regions" if len(picked) == len(group) else f"regions-{first.key}"
        study.figures[title] = figures.draw_regions(
            first.samples.pixels,
            {name: picked[name].maps for name in group},
            {name: picked[name].regions for name in group},
            titles=_names(first),
            captions={name: [f"head {head}" for head in picked[name].heads.tolist()] for name in group},
        )
    return study


def _names(s: Subject) -> list[str]:
    classes = s.samples.class_names
    return [classes[label] if 0 <= label < len(classes) else "" for label in s.samples.labels.tolist()]


def _same_images(picked: dict[str, _Picked]) -> list[list[str]]:
    """Runs grouped by the images they see."""
    groups: dict[Any, list[str]] = {}
    for name, one in picked.items():
        groups.setdefault((one.subject.run.settings.data, tuple(one.subject.samples.pixels.shape)), []).append(name)
    return list(groups.values())


def _matrices(s: Subject, block: BlockAttention) -> Any:
    head = s.options.head or 0
    check_head(head, block.sigma.shape[1])
    scores, sigma = block.scores[0, head], block.sigma[0, head]
    shown = {f"σ(A), {s.label}": sigma}
    place = f"{block.name}, head {head}"
    return figures.draw_matrices(scores, shown | ({"softmax(A)": block.softmax[0, head]} if _learns(s) else {}), place)


def _overlap(s: Subject, maps: Tensor) -> dict[str, list[float]]:
    """How well each head's map hits the object that the options name; empty without one."""
    options = s.options
    if options.mask is None and options.box is None:
        return {}
    if options.image is None:
        raise ValueError("--mask and --box belong to one image: name it with --image")
    size = read_file(options.image).size
    if options.mask is not None:
        drawn = read_file(options.mask, 1)
        if drawn.size != size:
            raise ValueError(f"{options.mask} is {drawn.size} and its image {size}: they must be of one size")
    else:
        assert options.box is not None
        drawn = Image.fromarray(box_mask(options.box, (size[1], size[0])).byte().mul(255).numpy())
    mask = s.run.object_mask(drawn)
    grown = upsample(maps, (mask.shape[0], mask.shape[1]))[0]  # (H,S,S)
    return _table(
        {
            "pointing_game": pointing_game(grown, mask).float(),
            "iou": iou(region(grown), mask.expand_as(grown)),
            "mass_inside": mass_inside(grown, mask),
        }
    )


def study_spectrum(subjects: Sequence[Subject]) -> Study:
    """Singular values of the scores A and of σ(A) in one block, over heads and images."""
    study = Study("singular values")
    panels = {}
    for s in subjects:
        block = choose_block(s.attention, s.options.block)
        found = {"A": spectrum(block.scores), "σ(A)": spectrum(block.sigma)}
        panels[f"{s.label}, {block.name}"] = found
        study.numbers[s.label] = {
            name: {"effective_rank": one.effective_rank, "scree_index": one.scree_index} for name, one in found.items()
        }
        for name, one in found.items():
            study.arrays[f"{s.key}/{name}"] = torch.stack([one.mean, one.low, one.high])
    study.figures["spectrum"] = figures.draw_spectra(panels)
    return study


def study_functions(subjects: Sequence[Subject]) -> Study:
    """The edge functions of one block, the formulas nearest to the strongest of them, the learned numbers' spread."""
    study = Study("edge functions")
    learning = [s for s in subjects if _learns(s)]
    if not learning:
        operators_of(subjects[0].model)  # says what is missing
    for s in learning:
        index = len(s.attention) - 1 if s.options.block is None else s.options.block
        op = operator_of_block(s.model, index)
        if op is None:
            study.notes.append(f"{s.label}: block {index} keeps softmax and has no edge functions")
            continue
        if not op.config.has_edges:
            study.notes.append(f"{s.label}: block {index} mixes tokens by a learned matrix and has no edge functions")
            continue
        x = torch.linspace(*score_range(s.attention[index].scores), CURVE_POINTS)
        heads = op.karat_heads if s.options.head is None else (s.options.head,)
        drawn: dict[str, Curves] = {}
        named: dict[str, list[Formula]] = {}
        for head in heads[:MOST_HEADS]:
            strong = curves(op, head, x, edges=NAMED_EDGES, spread=False)
            title = f"block {index}, head {head}"
            named[title] = [fit_formula(x.numpy(), values.numpy()) for values in strong.values]
            drawn[title] = strong.joined(curves(op, head, x, edges=DRAWN_EDGES))
            study.numbers.setdefault(s.label, {})[title] = [
                {"p": int(p), "q": int(q), "formula": near.text, "family": near.family, "error": near.error}
                for p, q, near in zip(strong.outputs, strong.inputs, named[title], strict=True)
            ]
            study.arrays[f"{s.key}/{title}"] = drawn[title].values
        study.arrays[f"{s.key}/x"] = x
        study.figures[f"functions-{s.key}"] = figures.draw_functions(drawn, named)
        rows = {name.replace(".attn.operator", ""): coefficients(op) for name, op in _first_and_last(s).items()}
        study.figures[f"coefficients-{s.key}"] = figures.draw_coefficients(rows)
    return study


def study_parts(subjects: Sequence[Subject]) -> Study:
    """What the learned part of attention consists of: a fixed row, the query's place, the scores; gates and sizes."""
    study = Study("parts of attention")
    learning = [s for s in subjects if _learns(s)]
    if not learning:
        operators_of(subjects[0].model)  # says what is missing
    for s in learning:
        try:
            found = parts_of(s.model, s.attention)
        except ValueError as error:
            if len(learning) == 1:
                raise
            study.notes.append(f"{s.label}: {error}")
            continue
        if not found:
            study.notes.append(f"{s.label}: softmax in every block, no learned part")
            continue
        study.figures[f"parts-{s.key}"] = figures.draw_parts(found)
        study.numbers[s.label] = {
            block.name: {
                "heads": list(block.heads),
                **_table({"gate": block.gates, "size": block.size}),
                **{
                    kind: _table({name: getattr(part, name) for name in ("row", "place", "scores")})
                    for kind, part in (("learned", block.learned), ("softmax", block.softmax))
                },
            }
            for block in found
        }
    return study


def _first_and_last(s: Subject) -> dict[str, Any]:
    operators = operators_of(s.model)
    names = list(operators)
    return {name: operators[name] for name in dict.fromkeys([names[0], names[-1]])}


def study_weights(subjects: Sequence[Subject]) -> Study:
    """Histograms of the weights at the start, middle and end of training, and how far they moved."""
    study = Study("weights")
    for s in subjects:
        checkpoints = trajectory(s.run.folder)
        found = histograms(checkpoints)
        names, epochs, _ = zip(*moments(checkpoints), strict=True)
        study.figures[f"weights-{s.key}"] = figures.draw_histograms(found, names, epochs)
        study.figures[f"divergence-{s.key}"] = figures.draw_divergence(found)
        study.numbers[s.label] = {kind.kind: [float(value) for value in kind.from_start] for kind in found}
        study.arrays |= {f"{s.key}/{kind.kind}": kind.counts for kind in found}
    return study


def study_sweep(subjects: Sequence[Subject]) -> Study:
    """Top-1 over the setting that the runs differ in."""
    results = [(s.run.contender, float(s.run.history[-1]["top1"])) for s in subjects if s.run.history]
    found = sweep(results, subjects[0].options.sweep)
    study = Study(f"sweep over {found.setting}")
    study.figures["sweep"] = figures.draw_sweep(found)
    study.numbers = {
        "setting": found.setting,
        "values": list(found.values),
        "lines": {name: {"mean": line.mean, "deviation": line.deviation} for name, line in found.lines.items()},
        "reference": found.reference,
    }
    return study


STUDIES: dict[str, Callable[[Sequence[Subject]], Study]] = {
    "curves": study_curves,
    "cost": study_cost,
    "attention": study_attention,
    "spectrum": study_spectrum,
    "functions": study_functions,
    "parts": study_parts,
    "ablation": study_ablation,
    "weights": study_weights,
    "landscape": study_landscape,
    "hessian": study_hessian,
    "sweep": study_sweep,
}
