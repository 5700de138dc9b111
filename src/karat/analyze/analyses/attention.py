"""What a model attends to: maps, regions, matrices and measures of attention; its singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from karat.analyze import figures
from karat.analyze.analysis import Analysis, rounded
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
from karat.analyze.quality import box_mask, iou, mass_inside, measures, pointing_game
from karat.analyze.spectrum import spectrum
from karat.analyze.subject import Subject
from karat.data.images import read_file

MOST_HEADS = 6  # more columns make a figure unreadable


@dataclass(frozen=True)
class _Picked:
    """The dominant head of each image (B,), its map (B,h,w) and the region that it picks, boolean (B,h,w)."""

    subject: Subject
    heads: Tensor
    maps: Tensor
    regions: Tensor


def analyse_attention(subjects: Sequence[Subject]) -> Analysis:
    """Maps of the class token, rollout, the region that the dominant head picks, σ of every head, measures."""
    analysis = Analysis("attention")
    picked: dict[str, _Picked] = {}
    for s in subjects:
        block = choose_block(s.attention, s.options.block)
        analysis.numbers[s.label] = {found.name: rounded(measures(found.sigma)) for found in s.attention}
        try:
            grid = grid_of(s.model)
            maps = class_maps(block.sigma, grid, signed=s.options.signed)
            flow = rollout([found.sigma for found in s.attention])
        except ValueError as error:
            analysis.notes.append(f"{s.label}: {error}")
        else:
            heads = range(maps.shape[1]) if s.options.head is None else [check_head(s.options.head, maps.shape[1])]
            columns = {f"head {h}": maps[:, h] for h in heads[:MOST_HEADS]} | {"rollout": rollout_maps(flow, grid)}
            analysis.figures[f"maps-{s.key}"] = figures.draw_maps(s.samples.pixels, columns, titles=_names(s))
            dominant, chosen = dominant_regions(maps)
            picked[s.label] = _Picked(s, dominant, maps[torch.arange(len(maps)), dominant], chosen)
            analysis.arrays |= {f"{s.key}/maps": maps, f"{s.key}/rollout": flow}
            overlap = _overlap(s, maps)
            if overlap:
                analysis.numbers[s.label]["overlap"] = overlap
        analysis.figures[f"matrices-{s.key}"] = _matrices(s, block)
        analysis.figures[f"heads-{s.key}"] = figures.draw_heads(
            {str(index): found.sigma[0] for index, found in enumerate(s.attention)}
        )
        analysis.arrays |= {f"{s.key}/scores": block.scores, f"{s.key}/sigma": block.sigma}
    for group in _same_images(picked):
        first = picked[group[0]].subject
        title = "regions" if len(picked) == len(group) else f"regions-{first.key}"
        analysis.figures[title] = figures.draw_regions(
            first.samples.pixels,
            {name: picked[name].maps for name in group},
            {name: picked[name].regions for name in group},
            titles=_names(first),
            captions={name: [f"head {head}" for head in picked[name].heads.tolist()] for name in group},
        )
    return analysis


def _names(s: Subject) -> list[str]:
    classes = s.samples.class_names
    return [classes[label] if 0 <= label < len(classes) else "" for label in s.samples.labels.tolist()]


def _same_images(picked: dict[str, _Picked]) -> list[list[str]]:
    """Runs grouped by the images they see."""
    groups: dict[Any, list[str]] = {}
    for name, one in picked.items():
        pixels = one.subject.samples.pixels
        groups.setdefault((tuple(pixels.shape), pixels.numpy().tobytes()), []).append(name)
    return list(groups.values())


def _matrices(s: Subject, block: BlockAttention) -> Any:
    head = check_head(s.options.head or 0, block.sigma.shape[1])
    scores, sigma = block.scores[0, head], block.sigma[0, head]
    shown = {f"σ(A), {s.label}": sigma}
    place = f"{block.name}, head {head}"
    return figures.draw_matrices(scores, shown | ({"softmax(A)": block.softmax[0, head]} if s.learns else {}), place)


def _overlap(s: Subject, maps: Tensor) -> dict[str, list[float]]:
    """How well each head's map hits the object that the options name; empty without one."""
    options = s.options
    if options.mask is None and options.box is None:
        return {}
    assert options.image is not None  # `open_subjects` saw to it
    size = read_file(options.image).size
    if options.mask is not None:
        drawn = read_file(options.mask, 1, ground="black")
        if drawn.size != size:
            raise ValueError(f"{options.mask} is {drawn.size} and its image {size}: they must be of one size")
    else:
        assert options.box is not None
        drawn = Image.fromarray(box_mask(options.box, (size[1], size[0])).byte().mul(255).numpy())
    mask = s.run.object_mask(drawn)
    grown = upsample(maps, (mask.shape[0], mask.shape[1]))[0]  # (H,S,S)
    return rounded(
        {
            "pointing_game": pointing_game(grown, mask).float(),
            "iou": iou(region(grown), mask.expand_as(grown)),
            "mass_inside": mass_inside(grown, mask),
        }
    )


def analyse_spectrum(subjects: Sequence[Subject]) -> Analysis:
    """Singular values of the scores A and of σ(A) in one block, over heads and images."""
    analysis = Analysis("singular values")
    panels = {}
    for s in subjects:
        block = choose_block(s.attention, s.options.block)
        found = {"A": spectrum(block.scores), "σ(A)": spectrum(block.sigma)}
        panels[f"{s.label}, {block.name}"] = found
        analysis.numbers[s.label] = {
            name: {"effective_rank": one.effective_rank, "scree_index": one.scree_index} for name, one in found.items()
        }
        for name, one in found.items():
            analysis.arrays[f"{s.key}/{name}"] = torch.stack([one.mean, one.low, one.high])
    analysis.figures["spectrum"] = figures.draw_spectra(panels)
    return analysis
