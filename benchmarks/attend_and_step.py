"""Times that one version of the package is compared with another by: attention alone, and a step of ViT-Tiny.

    PYTHONPATH=PATH_TO_A_CHECKOUT/src python benchmarks/attend_and_step.py

Medians of one process in milliseconds, forward and backward. Run it for both versions in turn, several times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from karat import KArAtOperator, create_model

THREADS = 2
ATTENDS = (  # B, H, N, D, attention, rounds
    (8, 3, 197, 64, "g3b", 15),
    (32, 3, 17, 32, "g3b", 40),
    (8, 3, 197, 64, "g3b,residual=softmax", 11),
    (32, 3, 65, 32, "static-b", 30),
)


def median(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds of a call, after two that warm up."""
    spent = []
    for turn in range(rounds + 2):
        began = time.perf_counter()
        run()
        if turn > 1:
            spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


def attend(B: int, H: int, N: int, D: int, attention: str, rounds: int) -> float:
    """One attention, forward and backward."""
    operator = KArAtOperator(H, N, attention)
    q, k, v = (torch.randn(B, H, N, D, requires_grad=True) for _ in range(3))
    return median(lambda: operator.attend(q, k, v).sum().backward(), rounds)


def step() -> float:
    """One update of ViT-Tiny with g3b, batch 8 at 224²."""
    model = create_model("vit_tiny_patch16_224", attention="g3b", num_classes=10)
    optimizer, images = torch.optim.AdamW(model.parameters()), torch.randn(8, 3, 224, 224)

    def update() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return median(update, 5)


def main() -> None:
    """Print a line for each."""
    torch.set_num_threads(THREADS)
    for case in ATTENDS:
        print(f"attend ({','.join(map(str, case[:4]))}) {case[4]}: {attend(*case):.2f} ms")
    print(f"step of ViT-Tiny, g3b: {step():.0f} ms")


if __name__ == "__main__":
    main()
