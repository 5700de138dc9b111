"""One training step of ViT-Tiny with the full-rank Fourier operator, G = 10: the one that needed 60 GB an image.

    python benchmarks/full_rank.py

Prints the peak memory of the process, everything included, after a step with a batch of four at 224².
"""

import argparse
import json

from karat.study.bench.step import build, step_of
from karat.study.bench.timing import environment
from karat.train.memory import peak_resident


def main() -> None:
    """Build, step twice (optimiser state included), print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--attention", default="fourier(grid=10)-b,rank=None")
    options = parser.parse_args()
    model = build("vit_tiny_patch16_224", "karat", options.attention)
    step = step_of(model, options.batch)
    losses = [step() for _ in range(2)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = {"attention": options.attention, "batch": options.batch, "parameters": parameters}
    print(json.dumps(report | {"losses": losses, "peak_GB": peak_resident() / 1e9} | environment()))


if __name__ == "__main__":
    main()
