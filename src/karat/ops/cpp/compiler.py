"""The C++ kernel's source, and how a compiler makes a shared library of it: for a wheel, or on this machine.

It imports nothing of PyTorch: pyproject's build hook runs this file where nothing is installed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc" / "basis_attention.cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# OpenMP's functions are left undefined and resolve to the runtime that PyTorch has loaded, so that there is one pool of
# threads. Without it the kernel starts threads of its own (threads.h).
OPENMP = "-fopenmp"
# What a wheel for Linux carries, by machine: library -> flags. The instructions are those that PyTorch asks of a CPU
# before it says AVX2 or AVX512.
WHEELS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    },
    "aarch64": {"neon": ()},
}


def compile_library(compiler: Sequence[str], library: Path, *flags: str, source: Path = SOURCE) -> None:
    """Compile `source` into `library`, which appears whole or not at all. Raises CalledProcessError with the output."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made, built = f"{folder}/kernel.o", f"{folder}/kernel.so"
        steps = ([*FLAGS, *flags, "-c", str(source), "-o", made], ["-shared", "-pthread", "-o", built, made])
        for step in steps:  # linked apart: with -fopenmp a linker would bring a second runtime
            subprocess.run([*compiler, *step], check=True, capture_output=True, text=True, errors="replace")
        os.replace(built, library)
