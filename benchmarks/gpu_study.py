"""The accuracy study of benchmarks/gpu.py: ViTs with each attention, trained as long, in as many calls as it takes.

    python benchmarks/gpu_study.py --data ../shared/data/cifar10 --output FOLDER

After so many minutes the run at hand is asked to stop, which saves it; the next call goes on with it. Prints JSON: a
row for each run, finished or not.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tyro

ATTENTIONS = ("softmax", "g3b", "g1b", "recommended")
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
FULL = {"recipe": "vit", "img-size": 224, "amp-dtype": "bfloat16", "workers": 12}
TOY = {"recipe": "digits", "data-fraction": 0.1, "img-size": 16, "patch-size": 4, "embed-dim": 24, "depth": 1}
TOY |= {"num-heads": 3, "device": "cpu"}


@dataclass(frozen=True)
class Study:
    """Options."""

    data: str
    """as karat train's --data"""
    output: Path
    """folder that keeps the runs, in `study`"""
    epochs: int = 5
    """of each run"""
    minutes: float = 9.0
    """after which it stops"""
    dry: bool = False
    """toys on the CPU, one model"""

    def run(self) -> list[dict[str, Any]]:
        """A row for each run: the small models first, so that what fits is comparable."""
        end, rows = time.monotonic() + 60 * self.minutes, []
        for model, attention in product(MODELS[: 1 if self.dry else None], ATTENTIONS):
            folder = self.output / "study" / f"{model}-{attention}-{self.epochs}"
            if not _summary(folder).get("finished") and time.monotonic() < end:
                self.train(model, attention, folder, end)
            found = _summary(folder)
            row = {"finished": bool(found.get("finished")), "top1": found.get("top1")}
            rows.append({"model": model, "attention": attention, "seconds": found.get("seconds_per_epoch"), **row})
        return rows

    def train(self, model: str, attention: str, folder: Path, end: float) -> None:
        """Until it's finished, or asked to stop at the end."""
        options = {"model": model, "attention": attention, "data": self.data, "epochs": self.epochs, "output": folder}
        options |= {"resume": "auto", "checkpoints": "last"} | (TOY if self.dry else FULL)
        command = [sys.executable, "-m", "karat", "train"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        child = subprocess.Popen(command, stdout=sys.stderr)
        try:
            child.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        if child.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    print(json.dumps(tyro.cli(Study, description=__doc__).run()))
