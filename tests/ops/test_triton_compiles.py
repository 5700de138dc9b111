"""The kernels pass Triton's compiler for Hopper and other GPUs, on any machine.

The interpreter takes a wider language than the compiler does, so running there proves too little. No GPU is needed to
compile: a stand-in for the driver names the chip.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import re
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor


spec, dtype, head, width, more, chip = sys.argv[1:]
# Shared memory that a block may use, KiB.
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "120": 99, "gfx942": 64}[chip]
AMD = chip.startswith("gfx")


class Chip:
    def get_current_target(self):
        return GPUTarget("hip", chip, 64) if AMD else GPUTarget("cuda", int(chip), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Chip())

from karat.basis import parse_basis
from karat.ops.call import Call
from karat.ops.softmax_part import SoftmaxPart
from karat.ops.triton import arguments, launch
from karat.ops.triton.arguments import Arguments


def compile_only(kernel, programs, tiles, **arguments):
    arguments |= {"BM": tiles.queries, "BN": tiles.keys, "num_warps": tiles.warps}
    if arguments["q"].dtype == torch.float32 and not AMD:
        arguments["PRECISION"] = "tf32x3"
    mocked = {name: MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    for stages in range(tiles.stages, 0, -1):  # as launch._launch does
        compiled = kernel.warmup(grid=(1,), **mocked, num_stages=stages)
        if compiled.metadata.shared <= SHARED * 1024:
            break
    assert compiled.metadata.shared <= SHARED * 1024, (kernel.fn.__name__, compiled.metadata.shared)
    if AMD and head <= 64:
        spilled = re.findall(r"\\.vgpr_spill_count: *(\\d+)", compiled.asm["amdgcn"])
        assert spilled == ["0"], (kernel.fn.__name__, spilled)
    print(kernel.fn.__name__, compiled.metadata.shared)


launch._launch = compile_only
arguments.shared_memory = lambda device: SHARED * 1024
basis, dtype, head, width = parse_basis(spec), getattr(torch, dtype), int(head), int(width)
B, H, N = 4, 3, 197
with torch.device("meta"):
    q = torch.empty(B, N, 3, H, head, dtype=dtype)[:, :, 0].transpose(1, 2)
    grad = torch.empty(B, H, N, width, dtype=dtype)
    u = torch.empty(*([B] if width > 16 else []), H, basis.num_parameters, N, width)
    bias, mask = torch.empty(1, H, N, N), torch.empty(B, 1, N, N, dtype=torch.bool)
    rows = torch.empty(B, H, N)
    part = SoftmaxPart(q, torch.empty_like(q), rows, torch.empty_like(q), torch.empty_like(q))
if not more.startswith("mask"):
    bias = mask = None
softmax = part if "softmax" in more else None
call = Call(q, q, 0.125, bias, mask)
launch.forward(Arguments(call, u, basis, softmax))
launch.backward(Arguments(call, u, basis, softmax, grad), (True, True, True, bias is not None))
if more == "batches":
    from karat.ops.triton import kernels, kernels_sums

    compiled = [kernels.basis_attention_fwd_kernel, kernels_sums.basis_attention_bwd_dkdu_kernel]
    before = [len(kernel.device_caches[0][0]) for kernel in compiled]
    with torch.device("meta"):
        for B in (16, 3, 1):
            q = torch.empty(B, N, 3, H, head, dtype=dtype)[:, :, 0].transpose(1, 2)
            grad = torch.empty(B, H, N, width, dtype=dtype)
            launch.forward(Arguments(Call(q, q, 0.125), u, basis))
            launch.backward(Arguments(Call(q, q, 0.125), u, basis, None, grad), (False, True, True, False))
    assert before == [len(kernel.device_caches[0][0]) for kernel in compiled], "another batch, another kernel"
"""

CASES = [
    ("fourier(grid=3)", "bfloat16", 64, 12, "plain"),
    ("fourier(grid=1)", "bfloat16", 64, 12, "batches"),
    ("gelu+bspline(grid=10)", "float16", 32, 12, "mask and bias"),
    ("rational", "bfloat16", 64, 12, "plain"),
    ("shannon", "float32", 64, 12, "mask and bias"),
    ("fourier(grid=3)", "bfloat16", 64, 12, "beside softmax"),
    ("fourier(grid=3)", "float32", 128, 128, "beside softmax"),
    ("bspline(grid=5)", "bfloat16", 128, 12, "mask and bias, beside softmax"),
]


CASES = [
    *((*case, "90") for case in CASES),
    *(("fourier(grid=3)", "bfloat16", 64, 12, "plain", chip) for chip in ("80", "86", "89", "120", "gfx942")),
    ("fourier(grid=1)", "bfloat16", 64, 12, "beside softmax", "gfx942"),
    ("fourier(grid=3)", "float32", 128, 128, "beside softmax", "86"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_compiles(case: tuple[object, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, *map(str, case)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr[-3000:]
    kernels = {line.split()[0].removeprefix("basis_attention_") for line in child.stdout.splitlines()}
    wanted = {"fwd_kernel", "bwd_dq_kernel", "bwd_dkdu_kernel"}
    assert kernels == (wanted if not str(case[4]).startswith("mask") else wanted | {"bwd_dbias_kernel"})
