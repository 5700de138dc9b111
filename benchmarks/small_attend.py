"""One attend beside PyTorch's softmax attention, fused and in three operations, forward and backward, one thread.

    PYTHONPATH=PATH_TO_A_CHECKOUT/src python benchmarks/small_attend.py [B,H,N,D ...]

The least CPU time of many calls in microseconds, softmax and operator alternating, and × of the faster softmax: where N
is small the calls cost more than the numbers, and other programs on the machine don't count.

For a chip with AVX2 alone, on one that has more: put the libraries of a wheel into src/karat/ops/cpp/libraries (`make
wheel` leaves them in build/libraries/x86_64) and set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from karat import KArAtOperator
from karat.basis import parse_basis
from karat.ops.implementations import about

SIZES = (
    (8, 3, 8, 32),
    (32, 3, 17, 32),
    (32, 3, 65, 32),
    (8, 3, 197, 64),
    (8, 6, 197, 64),
    (8, 12, 197, 64),
)  # B, H, N, D
ATTENTIONS = ("g1b", "g3b", "g3b,residual=softmax")
SECONDS = 2.0  # of each candidate
FEWEST_ROUNDS = 20


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in three operations."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def candidates(B: int, H: int, N: int, D: int) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass of each attention."""
    qkv = [x.detach().requires_grad_() for x in torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4)]
    upstream = torch.randn(B, N, H, D).transpose(1, 2)

    def both(attend: Callable[..., Tensor], parameters: Iterable[Tensor]) -> object:
        return torch.autograd.grad(attend(*qkv), (*qkv, *parameters), upstream)

    runs = {
        "softmax SDPA": partial(both, F.scaled_dot_product_attention, ()),
        "softmax eager": partial(both, eager, ()),
    }
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
    print(about("auto", parse_basis("fourier"), torch.empty(0)))
    for size in [tuple(map(int, text.split(","))) for text in sys.argv[1:]] or SIZES:
        runs = candidates(*size)
        for run in runs.values():
            spent(run, 5)
        least, until, rounds = dict.fromkeys(runs, float("inf")), time.perf_counter() + SECONDS * len(runs), 0
        while time.perf_counter() < until or rounds < FEWEST_ROUNDS:
            for name, run in runs.items():
                least[name] = min(least[name], spent(run, 1 if size[2] > 64 else 4))
            rounds += 1
        faster = min(us for name, us in least.items() if name.startswith("softmax"))
        shown = (f"{name} {us:.0f} ({us / faster:.2f}×)" for name, us in least.items())
        print(f"({','.join(map(str, size))}): {', '.join(shown)} µs")


if __name__ == "__main__":
    main()
