"""How many images a second the loaders alone deliver, beside what ViT-Tiny at 32² takes in while it trains.

    python benchmarks/data_loading.py [--data FOLDER] [--seconds 5] [--threads 2]

FOLDER: any `--data` of small images; the default is CIFAR-10 as parquet, ../shared/data/cifar10. Printed: images/s of
the quick recipe (decoded once, in memory), of the paper's ViT recipe (RandAugment image by image) with 0 and 2 worker
processes, and of a float32 training step of vit_tiny with patch 4 at 32² on the same cores.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from karat import create_model
from karat.data.loader import Loader
from karat.data.splits import DataOptions, load_data
from karat.runs.recipes import RECIPES


def loader_rate(loader: Loader, seconds: float) -> float:
    """Images/s over at least `seconds`, whole epochs of a loader that has been opened before."""
    next(iter(loader))
    images, began, epoch = 0, time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        loader.set_epoch(epoch)
        epoch += 1
        for batch, _ in loader:
            images += len(batch)
            if time.perf_counter() - began > seconds:
                break
    return images / spent


def training_rate(attention: str, classes: int, seconds: float, batch_size: int = 128) -> float:
    """Images/s of forward, backward and AdamW on one batch that is there already."""
    model = create_model("vit_tiny_patch16_224", attention=attention, num_classes=classes, img_size=32, patch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(classes, (batch_size,))
    steps, began = -1, 0.0
    while steps < 1 or time.perf_counter() - began < seconds:
        if steps == 0:  # the first step only warms up
            began = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps * batch_size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = load_data(DataOptions(options.data, RECIPES["quick"], img_size=32))
    began = time.perf_counter()
    _ = quick.train
    print(f"decoding {quick.train.order.n} images once: {time.perf_counter() - began:.1f} s")
    rates = {"quick, in memory": loader_rate(quick.train, options.seconds)}
    for workers in (0, 2):
        data = load_data(DataOptions(options.data, RECIPES["vit"], img_size=32, workers=workers))
        rates[f"vit recipe, {workers} workers"] = loader_rate(data.train, options.seconds)
    for attention in ("softmax", "g3b"):
        rates[f"training vit_tiny/4 at 32², {attention}"] = training_rate(attention, quick.num_classes, options.seconds)
    for name, rate in rates.items():
        print(f"{name:<40}{rate:>10,.0f} images/s")


if __name__ == "__main__":
    main()
