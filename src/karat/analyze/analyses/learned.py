"""What learnable attention learned: its edge functions, what its attention consists of, what accuracy rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from karat.analyze import figures
from karat.analyze.ablation import ablate
from karat.analyze.analysis import Analysis, rounded
from karat.analyze.functions import (
    Curves,
    arguments_of,
    coefficients,
    drawn_curves,
    instead_of_edges,
    operator_of_block,
    operators_of,
)
from karat.analyze.parts import AttentionParts, parts_of
from karat.analyze.subject import Subject, learning
from karat.analyze.symbolic import Formula

MOST_HEADS = 6  # more panels make a figure unreadable


def analyse_functions(subjects: Sequence[Subject]) -> Analysis:
    """The edge functions of one block, the formulas nearest to the strongest of them, the learned numbers' spread."""
    analysis = Analysis("edge functions")
    for s in learning(subjects):
        index = len(s.attention) - 1 if s.options.block is None else s.options.block
        op = operator_of_block(s.model, index)
        if op is None or not op.config.has_edges:
            instead = instead_of_edges(s.model, index, op)
            analysis.notes.append(f"{s.label}: block {index} {instead} and has no edge functions")
            continue
        arguments = arguments_of(op, s.attention[index])
        heads = op.karat_heads if s.options.head is None else (s.options.head,)
        drawn: dict[str, Curves] = {}
        named: dict[str, list[Formula]] = {}
        for head in heads[:MOST_HEADS]:
            title = f"block {index}, head {head}"
            found, near = drawn_curves(op, head, arguments)
            drawn[title], named[title] = found, near
            analysis.numbers.setdefault(s.label, {})[title] = [
                {"p": int(p), "q": int(q), "formula": one.text, "family": one.family, "error": one.error}
                for p, q, one in zip(found.outputs, found.inputs, near, strict=False)
            ]
            analysis.arrays |= {f"{s.key}/{title}": found.values, f"{s.key}/x": found.x}
        analysis.figures[f"functions-{s.key}"] = figures.draw_functions(drawn, named, argument=op.order.argument)
        operators = operators_of(s.model)
        first_and_last = dict.fromkeys([next(iter(operators)), next(reversed(operators))])
        rows = {name.replace(".attn.operator", ""): coefficients(operators[name]) for name in first_and_last}
        analysis.figures[f"coefficients-{s.key}"] = figures.draw_coefficients(rows)
    return analysis


def analyse_parts(subjects: Sequence[Subject]) -> Analysis:
    """What the learned part of attention consists of: a fixed row, the query's place, the scores; gates and sizes."""
    analysis = Analysis("parts of attention")
    for s, found in analysis.each(learning(subjects), _parts):
        analysis.figures[f"parts-{s.key}"] = figures.draw_parts(found)
        analysis.numbers[s.label] = {block.name: _numbers(block) for block in found}
    return analysis


def _parts(s: Subject) -> list[AttentionParts]:
    found = parts_of(s.model, s.attention)
    if not found:
        raise ValueError("softmax in every block, no learned part")
    return found


def _numbers(block: AttentionParts) -> dict[str, Any]:
    found = {"heads": list(block.heads), **rounded({"gate": block.gates, "size": block.size})}
    for kind, part in (("learned", block.learned), ("softmax", block.softmax)):
        found[kind] = rounded({name: getattr(part, name) for name in ("row", "place", "scores")})
    return found


def analyse_ablation(subjects: Sequence[Subject]) -> Analysis:
    """Top-1 and loss with parts of the learned attention taken away."""
    analysis = Analysis("learned attention taken away")
    kept = {}
    for s, found in analysis.each(subjects, lambda s: ablate(s.model, s.loss_samples.images, s.loss_samples.labels)):
        kept[s.label] = found
        analysis.numbers[s.label] = {
            "images": len(s.loss_samples.labels),
            "split": s.options.split,
            "kept": {name: vars(outcome) for name, outcome in found.items()},
        }
    analysis.figures["ablation"] = figures.draw_ablation(kept)
    return analysis
