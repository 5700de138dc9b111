"""The residual form, softmax and operator from one pass over the scores, beside softmax alone and the operator alone.

    python benchmarks/one_pass.py --threads 1            # attention alone and training steps of the small ViT
    python benchmarks/one_pass.py --threads 1 --bf16     # the steps in bfloat16 autocast

Attention alone is forward+backward; a step is AdamW's, batch 128 at 32². ViT-Tiny's and ViT-Small's steps:
`karat bench step --models tiny-residual small-residual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from karat import KArAtOperator
from karat.study.bench.attention import AttentionShape, eager_softmax, forward_backward
from karat.study.bench.measurement import Measurement
from karat.study.bench.step import SOFTMAX_WAYS, build, step_of
from karat.study.bench.timing import Timing, against_softmax, alternate

# ViT-Tiny and ViT-Small at 224², and the small ViT at 32².
SHAPES = {
    "tiny": AttentionShape(8, 3, 197, 64),
    "small": AttentionShape(8, 6, 197, 64),
    "small ViT": AttentionShape(32, 3, 65, 32),
}
SMALL_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
LEARNABLE = ("g3b", "g3b,residual=softmax", "g3b,softmax_heads=2")


@dataclass(frozen=True)
class OnePass:
    """Two tables, each row's ways measured in one alternating run."""

    rounds: int = 15
    """counted rounds; the median is quoted"""
    threads: int = 0
    """CPU threads; 0 keeps torch's own choice"""
    bf16: bool = False
    """the steps alone, in bfloat16 autocast"""
    output: Path | None = None
    """folder for one_pass-*.json; nothing is written without it"""

    def run(self) -> None:
        """Measure, print, keep."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if not self.bf16:
            rows = [row for name, shape in SHAPES.items() for row in _rows(name, self.alone(shape))]
            self.keep("alone", Measurement("attention forward+backward", rows))
        precision = "bfloat16" if self.bf16 else "float32"
        self.keep(f"step-{precision}", Measurement(f"training step, {precision}", _rows("small ViT", self.steps())))

    def alone(self, shape: AttentionShape) -> dict[str, Timing]:
        """Seconds of attention alone."""
        q, k, v, grad = torch.randn(4, shape.B, shape.H, shape.N, shape.D).unbind()
        for x in (q, k, v):
            x.requires_grad_()
        ways = {"softmax eager": eager_softmax, "softmax SDPA": torch.nn.functional.scaled_dot_product_attention}
        ways |= {name: KArAtOperator(shape.H, shape.N, name).attend for name in LEARNABLE}
        return alternate(
            {name: partial(forward_backward, way, q, k, v, grad) for name, way in ways.items()}, self.rounds
        )

    def steps(self) -> dict[str, Timing]:
        """Seconds of a training step."""
        model, amp = "vit_tiny_patch16_224", torch.bfloat16 if self.bf16 else None
        models = {way: build(model, way, "", **SMALL_VIT) for way in SOFTMAX_WAYS}
        models |= {name: build(model, "karat", name, **SMALL_VIT) for name in LEARNABLE}
        return alternate({name: step_of(model, 128, amp=amp) for name, model in models.items()}, self.rounds)

    def keep(self, name: str, rows: Measurement) -> None:
        """Show the rows, and write them if there is a folder."""
        rows.show()
        if self.output is not None:
            rows.save(self.output / f"one_pass-{name}.json")


def _rows(model: str, timings: dict[str, Timing]) -> list[dict[str, object]]:
    ratios, least = against_softmax(timings), min(timings[way].least for way in SOFTMAX_WAYS)
    return [
        {
            "model": model,
            "way": way,
            "median ms": 1e3 * timing.median,
            "× softmax": ratios[way],
            "least ms": 1e3 * timing.least,
            "least × least softmax": timing.least / least,
        }
        for way, timing in timings.items()
    ]


if __name__ == "__main__":
    tyro.cli(OnePass).run()
