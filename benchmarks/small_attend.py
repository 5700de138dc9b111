"""One attend beside PyTorch's fused softmax attention where N is small, forward and backward, one thread.

    PYTHONPATH=PATH_TO_A_CHECKOUT/src python benchmarks/small_attend.py

The least CPU time of many calls in microseconds, softmax and operator alternating: at such sizes the calls cost more
than the numbers, and other programs on the machine don't count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from karat import KArAtOperator

SIZES = ((8, 3, 8, 32), (32, 3, 17, 32), (32, 3, 65, 32), (8, 3, 197, 64), (8, 12, 197, 64))  # B, H, N, D
ATTENTIONS = ("g3b", "g3b,residual=softmax")
SECONDS = 2.0  # of each candidate
FEWEST_ROUNDS = 20


def candidates(B: int, H: int, N: int, D: int) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass of each attention."""
    qkv = [x.detach().requires_grad_() for x in torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4)]
    upstream = torch.randn(B, N, H, D).transpose(1, 2)

    def both(attend: Callable[..., Tensor], parameters: Iterable[Tensor]) -> object:
        return torch.autograd.grad(attend(*qkv), (*qkv, *parameters), upstream)

    runs = {"softmax": partial(both, F.scaled_dot_product_attention, ())}
    for attention in ATTENTIONS:
        operator = KArAtOperator(H, N, attention)
        runs[attention] = partial(both, operator.attend, tuple(operator.parameters()))
    return runs


def spent(run: Callable[[], object], calls: int) -> float:
    """Microseconds of CPU of one call, the mean of several."""
    began = time.thread_time()
    for _ in range(calls):
        run()
    return 1e6 * (time.thread_time() - began) / calls


def main() -> None:
    """Print a line for each size."""
    torch.set_num_threads(1)
    for size in SIZES:
        runs = candidates(*size)
        for run in runs.values():
            spent(run, 5)
        least, until, rounds = dict.fromkeys(runs, float("inf")), time.perf_counter() + SECONDS * len(runs), 0
        while time.perf_counter() < until or rounds < FEWEST_ROUNDS:
            for name, run in runs.items():
                least[name] = min(least[name], spent(run, 1 if size[2] > 64 else 4))
            rounds += 1
        shown = (f"{name} {us:.0f} ({us / least['softmax']:.2f}×)" for name, us in least.items())
        print(f"({','.join(map(str, size))}): {', '.join(shown)} µs")


if __name__ == "__main__":
    main()
