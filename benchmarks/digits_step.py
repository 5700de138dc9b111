"""The step of `make run` with each attention: forward, backward, clipping, AdamW, as `karat train` does it.

    PYTHONPATH=PATH_TO_A_CHECKOUT/src python benchmarks/digits_step.py [ATTENTION ...]

The least and the median CPU time of many steps in milliseconds, alternating, one thread, and × of the first; what the
data cost is left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from karat.runs.classification import Settings
from karat.train.build import assemble, create_accelerator
from karat.train.classify import Classification
from karat.train.step import update

ATTENTIONS = ("softmax", "g1b", "g3b", "recommended")
ROUNDS = 150


def stepper(attention: str) -> Callable[[int], object]:
    """A call does the update of that number, on the first batch of the digits."""
    task = Classification()
    settings = task.resolve(Settings(attention=attention, device="cpu"))
    accelerator = create_accelerator(settings)
    data = task.load_data(settings, accelerator)
    parts = assemble(task, settings, accelerator, data, updates_per_epoch=45)
    batch = next(iter(data.train))
    parts.model.train()
    return partial(update, parts, group=[batch])


def main() -> None:
    """Print a line for each attention."""
    torch.set_num_threads(1)
    steps = {name: stepper(name) for name in sys.argv[1:] or ATTENTIONS}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 5):
        for name, step in steps.items():
            began = time.thread_time()
            step(turn)
            if turn > 4:
                spent[name].append(1e3 * (time.thread_time() - began))
    first = next(iter(spent.values()))
    for name, times in spent.items():
        ratios = min(times) / min(first), statistics.median(times) / statistics.median(first)
        print(
            f"{name}: least {min(times):.2f} ms ({ratios[0]:.2f}×), median {statistics.median(times):.2f} "
            f"({ratios[1]:.2f}×)"
        )


if __name__ == "__main__":
    main()
