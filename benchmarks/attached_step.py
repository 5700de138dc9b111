"""A step of ViT-Tiny with operators attached to timm's own modules, and with karat's modules in their places.

    python benchmarks/attached_step.py [ROUNDS]

Steps of both take turns in one process on one thread. Milliseconds of the processor: least, median, and the median of
attached over the record in the same round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import karat
from karat.models.attach.place import attach
from karat.operator.config import KArAtConfig

BATCH, ATTENTION = 4, "g3b"


def attached() -> nn.Module:
    """As a model that has no record is converted."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    attach(model, KArAtConfig.parse(ATTENTION), None, lambda able, _: able, "karat_operator")
    return model


def recorded() -> nn.Module:
    """As karat converts a ViT."""
    return karat.karatize(timm.create_model("vit_tiny_patch16_224", num_classes=10), ATTENTION)


def stepper(make: Callable[[], nn.Module]) -> Callable[[], float]:
    """One update, and the milliseconds of the processor that it took."""
    torch.manual_seed(0)
    model = make()
    optimizer, images = torch.optim.AdamW(model.parameters(), 1e-4), torch.randn(BATCH, 3, 224, 224)

    def step() -> float:
        began = time.process_time()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        return 1e3 * (time.process_time() - began)

    return step


def main() -> None:
    """Print both."""
    torch.set_num_threads(1)
    steps = {"attached": stepper(attached), "record": stepper(recorded)}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else 15):
        for name in sorted(steps, reverse=bool(turn % 2)):  # each is first in half of the rounds
            spent[name].append(steps[name]())
    for name, times in spent.items():
        print(f"{name:8} least {min(times[1:]):.0f} ms, median {statistics.median(times[1:]):.0f} ms")
    ratios = [a / b for a, b in zip(spent["attached"][1:], spent["record"][1:], strict=True)]
    least = min(spent["attached"][1:]) / min(spent["record"][1:])
    print(f"attached over record: of the least {least:.3f}, median of rounds {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
