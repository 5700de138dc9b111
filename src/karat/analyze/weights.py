"""How weights are spread at the start, the middle and the end of training, and how far the spread has moved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from karat.runs.files import read_tensors

# Buffers of an operator: what isn't learned is no weight.
FIXED = ("factor", "base_gain")
# Which kind of weight a parameter is, by a piece of its name; the first that fits.
KINDS = {
    "operator W": ("operator.W",),
    "operator C": ("operator.C",),
    "operator gates": ("operator.gate",),
    "operator sharpness": ("operator.sharpness",),
    "operator coefficients": ("operator.layers.",),
    "position bias": (".position_bias.",),
    "attention qkv": (".qkv.", ".qk.", ".q.", ".k.", ".v."),
    "embedding": ("pos_embed", "patch_embed", "cls_token", "reg_token"),
    "attention projection": (".proj.",),
    "MLP": (".mlp.",),
    "head": ("head.",),
}


@dataclass(frozen=True)
class Histograms:
    """One kind of weight along training: counts (T,bins) on common bin edges (bins+1,), one row a checkpoint.

    `from_start` is the Jensen-Shannon divergence in bits (0 alike, 1 disjoint) of each row from the first, `steps`
    that from the row before (0 for the first).
    """

    kind: str
    epochs: tuple[int, ...]
    counts: Tensor
    bin_edges: Tensor
    from_start: Tensor
    steps: Tensor


def kind_of(name: str) -> str:
    """The kind of weight that a parameter's name means; "other" for norms, biases alone and the rest."""
    # "operator.0.W" is of a module that calls for attention several times
    name = re.sub(r"operator\.\d+\.", "operator.", name)
    return next((kind for kind, pieces in KINDS.items() if any(piece in name for piece in pieces)), "other")


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in bits of two histograms (...,bins): 0 alike, 1 disjoint."""
    p, q = (x.double() / x.double().sum(-1, keepdim=True) for x in (p, q))
    middle = (p + q) / 2
    nats = torch.special.entr(middle).sum(-1) - (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2
    return (nats / torch.log(torch.tensor(2.0, dtype=torch.float64))).clamp(0, 1)


def histograms(checkpoints: Sequence[tuple[int, Path]], *, bins: int = 80) -> list[Histograms]:
    """Histograms of every kind of weight along the checkpoints (epoch, file), which are read one at a time.

    Bins span all checkpoints. Twice through the files: once for the ranges, once to count.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for _, path in checkpoints:
        for kind, values in _by_kind(read_tensors(path)).items():
            low, high = float(values.min()), float(values.max())
            before = ranges.get(kind, (low, high))
            ranges[kind] = min(low, before[0]), max(high, before[1])
    counts: dict[str, list[Tensor]] = {kind: [] for kind in ranges}
    for _, path in checkpoints:
        for kind, values in _by_kind(read_tensors(path)).items():
            low, high = widened(*ranges[kind])
            counts[kind].append(torch.histc(values, bins, low, high))
    epochs = tuple(epoch for epoch, _ in checkpoints)
    found = []
    for kind in [k for k in (*KINDS, "other") if k in counts]:
        rows = torch.stack(counts[kind])
        steps = torch.cat([rows.new_zeros(1).double(), divergence(rows[1:], rows[:-1])])
        bin_edges = torch.linspace(*widened(*ranges[kind]), bins + 1)
        found.append(Histograms(kind, epochs, rows, bin_edges, divergence(rows, rows[:1]), steps))
    return found


def _by_kind(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(FIXED):
            check_finite(name, tensor)
            groups.setdefault(kind_of(name), []).append(tensor.flatten().float())
    return {kind: torch.cat(parts) for kind, parts in groups.items()}


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError for numbers that no histogram can count."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf: the training diverged")


def widened(low: float, high: float) -> tuple[float, float]:
    """Ends of a histogram: those of its numbers, or around them where all are one."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)
