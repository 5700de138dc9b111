"""The kernels pass the compilers of NVIDIA's and AMD's chips, on any machine, and take no more than a chip has.

The interpreter takes a wider language than the compiler does, so running there proves too little. No GPU is needed to
compile: benchmarks/compiled.py names the chip. It compiles in a process of its own, as these tests interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# Shared memory that a block may use, KiB.
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "120": 99, "gfx942": 64}
KERNELS = {"fwd", "bwd_dq", "bwd_dkdu"}


LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("compiled", "benchmarks/compiled.py")
sys.modules["compiled"] = compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)
"""
SERVE = """
for line in sys.stdin:
    compiled.Compiled(**json.loads(line)).run()  # prints its rows
    print("null", flush=True)
"""
Rows = list[dict[str, Any]]


def command(code: str) -> tuple[list[str], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return [sys.executable, "-c", LOAD + code], environment


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., Rows]]:
    """A row for each kernel; whatever is compiled fits into the chip's shared memory. One process compiles for all."""
    line, environment = command(SERVE)
    with subprocess.Popen(line, cwd=ROOT, text=True, env=environment, stdin=PIPE, stdout=PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def compiled(**options: Any) -> Rows:
            child.stdin.write(json.dumps(options) + "\n")
            child.stdin.flush()
            rows = list(iter(lambda: json.loads(child.stdout.readline()), None))  # of a child that died: no JSON
            for row in rows:
                assert row["shared"] <= SHARED[row["chip"]] * 1024, row
            return rows

        yield compiled
        child.stdin.close()


def test_the_largest_kernels_spill_nothing_where_memory_is_least(compiled: Callable[..., Rows]) -> None:
    rows = compiled(chips=["120"], cases=["fourier(grid=3) beside softmax"])
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [row for row in rows if row["spilled"]]


@pytest.mark.slow
@pytest.mark.parametrize(("chips", "tokens"), [(tuple(SHARED), 197), (("86",), 65)])
def test_nothing_spills(compiled: Callable[..., Rows], chips: tuple[str, ...], tokens: int) -> None:
    rows = compiled(chips=chips, tokens=tokens, instructions=False)
    found = {(row["chip"], row["case"], row["kernel"]) for row in rows}
    assert found >= {(chip, "fourier(grid=1)", kernel) for chip in chips for kernel in KERNELS}
    assert not [row for row in rows if row["spilled"]]


CASES = [
    ("gelu+bspline(grid=10) masked", "float16", 32, 12),
    ("rational", "bfloat16", 64, 12),
    ("shannon masked", "float32", 64, 12),
    ("fourier(grid=3) masked", "bfloat16", 64, 12),
    ("fourier(grid=3) beside softmax", "float32", 128, 128),
    ("bspline(grid=5) masked beside softmax", "bfloat16", 128, 12),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_compiles(compiled: Callable[..., Rows], case: tuple[Any, ...]) -> None:
    spec, dtype, head, width = case
    options = {"dtype": dtype, "head": head, "width": width, "instructions": False}
    rows = compiled(chips=["86"], cases=[spec], **options)  # the least shared memory
    assert {row["kernel"] for row in rows} == (KERNELS | {"bwd_dbias"} if "masked" in spec else KERNELS)


BATCHES = """
from karat.ops.triton import kernels, kernels_sums

kernels = [kernels.basis_attention_fwd_kernel, kernels.basis_attention_bwd_dq_kernel,
           kernels_sums.basis_attention_bwd_dkdu_kernel]
counts = []
for batch in (128, 16, 3, 1):
    compiled.Compiled(chips=("90",), cases=("fourier(grid=1)",), batch=batch, instructions=False).run()
    counts.append([len(kernel.device_caches["90"][0]) for kernel in kernels])
assert counts[0] == [1, 1, 1] and counts == [counts[0]] * 4, counts
"""


@pytest.mark.slow
def test_a_smaller_batch_compiles_nothing_anew() -> None:
    line, environment = command(BATCHES)
    child = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr[-3000:]
