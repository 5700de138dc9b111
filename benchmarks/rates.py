"""How far one Adam step and a hundred move an operator's output, beside a linear layer: the table of docs/method.md.

    OMP_NUM_THREADS=1 python benchmarks/rates.py

Each module learns a random target of its output's size at a rate of 1e-3; what is measured is ‖ΔO‖ / ‖O‖. One step over
N, R and G in every order; a hundred where they take seconds. Some two minutes on one thread. Writes
docs/results/rates.json; `make docs` puts it into the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from karat import KArAtOperator
from karat.basis import BASES
from karat.models.kan import FourierLinear, GroupRational, RBFLinear, SplineLinear
from karat.study.bench.timing import environment

TOKENS, RANKS, GRIDS = (17, 65, 197, 785), (2, 12, 48), (1, 3, 11)
ORDERS = ("WPhi", "PhiW", "PhiPhi")
HEAD_DIM, BATCH, HEADS = 32, 2, 3
FEW = 197  # up to here a hundred steps of any basis take seconds
WIDTHS = (48, 192, 768)
SAMPLES = 256
KAN_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "kan": lambda width: SplineLinear(width, width, grid=8),
    "fourierkan": lambda width: FourierLinear(width, width),
    "fastkan": lambda width: RBFLinear(width, width, grid=8),
    "grkan, its functions alone": lambda width: GroupRational(8, 5, 4, "gelu", True),
}


@dataclass(frozen=True)
class Options:
    """Measure the relative change of outputs by Adam steps of 1e-3."""

    output: Path = Path("docs/results/rates.json")
    """The numbers."""


def changes(module: nn.Module, run: Callable[[nn.Module], Tensor], steps: int) -> tuple[float, float | None]:
    """‖ΔO‖/‖O‖ after the first step and after the last, None where there is one."""
    before = run(module).detach()
    target = before + before.norm() / before.numel() ** 0.5 * torch.randn_like(before)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        (run(module) - target).square().sum().backward()  # a sum: Adam's ε is nothing beside its gradients
        optimizer.step()
        if step in (0, steps - 1):
            found.append(float((run(module).detach() - before).norm() / before.norm()))
    return found[0], found[-1] if steps > 1 else None


def operator_row(kind: str, spec: str, tokens: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, BATCH, HEADS, tokens, HEAD_DIM).unbind()
    op = KArAtOperator(HEADS, tokens, spec)
    first, last = changes(op, lambda op: op.attend(q, k, v), steps)
    return {"kind": kind, "spec": spec, "tokens": tokens, "one": first, "hundred": last}


def layer_row(kind: str, width: int) -> dict[str, Any]:
    torch.manual_seed(1)
    x = torch.randn(SAMPLES, width)
    first, last = changes(KAN_LAYERS[kind](width), lambda layer: layer(x), 100)
    return {"kind": kind, "width": width, "one": first, "hundred": last}


def operators() -> Iterator[dict[str, Any]]:
    """Every order over N, R and G; every basis, and the controls, over N."""
    for tokens in TOKENS:
        for order in ORDERS:
            for rank in RANKS:
                for grid in GRIDS:
                    steps = 100 if (tokens <= FEW and (rank == 12 or grid == 3)) or (rank, grid) == (12, 3) else 1
                    yield operator_row(order, f"g{grid}b,rank={rank},order={order}", tokens, steps)
        for grid in GRIDS:
            yield operator_row("Full", f"g{grid}b,rank=None", tokens, 100 if tokens <= FEW else 1)
        for basis in BASES:
            yield operator_row("basis", f"{basis}-b", tokens, 100 if tokens <= 65 else 1)
        for spec in ("g6b,rank=None,order=Pointwise", "static-b", "row-b,rank=None", "g3b,residual=softmax,gate=1"):
            yield operator_row("control", spec, tokens, 100 if tokens <= FEW else 1)
        yield operator_row("paper's draws", "g3b,init=paper", tokens, 100)


def main(options: Options) -> None:
    start = time.process_time()
    rows = list(operators())
    layers = [layer_row(kind, width) for kind in KAN_LAYERS for width in WIDTHS]
    seconds = round(time.process_time() - start)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"rate": 1e-3, "batch": BATCH, "head_dim": HEAD_DIM, "processor_seconds": seconds} | environment()
    options.output.write_text(json.dumps(found | {"operators": rows, "layers": layers}, indent=1) + "\n")
    print(f"{len(rows)} operators and {len(layers)} layers in {seconds} s -> {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
