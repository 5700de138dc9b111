"""A training step of ViT-Tiny+G3B, Small+G3B and Base+G1B against timm's two softmax paths: `karat bench step`.

python benchmarks/step_time.py --output docs/results/performance
"""

import sys

from karat.study.bench.commands import bench

if __name__ == "__main__":
    bench(["step", *sys.argv[1:]])
