"""What the compiler makes of the Triton kernels for each chip: registers, spills, shared memory, instructions a score.

    python benchmarks/compiled.py --output docs/results/performance/compiled.json
    python benchmarks/compiled.py --chips 86 --cases "fourier(grid=3) beside softmax" --dtype float32 --head 128

No GPU is needed: a stand-in for the driver names the chip, and what would be launched is compiled at its launch's
settings. Instructions a score are those of the innermost loop, which goes once over a tile: times lanes, over the
tile's scores. Divided by what a chip issues they're a floor for the time, whatever its tensor cores and memory do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from karat.basis import parse_basis
from karat.ops.call import Call
from karat.ops.softmax_part import SoftmaxPart
from karat.ops.triton import arguments, launch
from karat.ops.triton.arguments import Arguments

# Shared memory that a block may use, KiB.
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "120": 99, "gfx942": 64}
CASES = tuple(f"fourier(grid={G}){more}" for more in ("", " beside softmax") for G in (1, 3))
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Compiled:
    """Compile every kernel of a forward and a backward pass and say what it takes."""

    chips: tuple[str, ...] = tuple(SHARED)
    """compute capability without the dot, or AMD's name"""
    cases: tuple[str, ...] = CASES
    """BASIS, then of: masked (a mask of pairs and a bias that learns), beside softmax"""
    dtype: str = "bfloat16"
    """of q, k and v"""
    head: int = 64
    """D"""
    width: int = 12
    """E: the rank, or the head's width; more than 16 is taken for an image's own"""
    tokens: int = 197
    """N"""
    batch: int = 128
    """B"""
    instructions: bool = True
    """Count those of the innermost loop; to disassemble takes a third of all time."""
    output: Path | None = None
    """JSON; printed otherwise"""

    def run(self) -> list[dict[str, Any]]:
        """A row for each kernel of each case on each chip."""
        rows: list[dict[str, Any]] = []
        for chip in self.chips:
            driver.set_active(Chip(chip))
            arguments.shared_memory = lambda device, chip=chip: SHARED[chip] * 1024  # type: ignore[assignment]  # no driver to ask
            for case in self.cases:
                about = {"chip": chip, "case": case}
                launch._launch = partial(compile_only, rows, about, self.instructions)  # type: ignore[assignment]  # instead of a launch
                self.launch(case)
        return rows

    def launch(self, case: str) -> None:
        """Forward and backward on tensors without memory."""
        spec, *more = re.split(r" (?=masked|beside)", case)
        basis, dtype = parse_basis(spec), getattr(torch, self.dtype)
        B, H, N, D, E = self.batch, 3, self.tokens, self.head, self.width
        with torch.device("meta"):
            q = torch.empty(B, N, 3, H, D, dtype=dtype)[:, :, 0].transpose(1, 2)
            grad = torch.empty(B, H, N, E, dtype=dtype)
            u = torch.empty(*([B] if E > 16 else []), H, basis.num_parameters, N, E)
            bias, mask = torch.empty(1, H, N, N), torch.empty(B, 1, N, N, dtype=torch.bool)
            part = SoftmaxPart(q, torch.empty_like(q), torch.empty(B, H, N), torch.empty_like(q), torch.empty_like(q))
        masked = "masked" in more
        call = Call(q, q, 0.125, bias if masked else None, mask if masked else None)
        softmax = part if "beside softmax" in more else None
        launch.forward(Arguments(call, u, basis, softmax))
        launch.backward(Arguments(call, u, basis, softmax, grad), (True, True, True, masked))


class Chip:
    """As much of a driver as the compiler asks for."""

    def __init__(self, name: str) -> None:
        self.target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_only(
    rows: list[dict[str, Any]],
    about: dict[str, str],
    instructions: bool,
    kernel: Any,
    programs: int,
    tiles: Any,
    **given: Any,
) -> None:
    """In the place of a launch: as deep a pipeline as fits, as there."""
    given |= {"BM": tiles.queries, "BN": tiles.keys, "num_warps": tiles.warps}
    amd = about["chip"].startswith("gfx")
    if given["q"].dtype == torch.float32 and not amd:
        given["PRECISION"] = "tf32x3"
    if amd and given.get("SINE") == "unit":
        given["SINE"] = "polynomial"
    mocked = {name: MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    for stages in range(tiles.stages, 0, -1):
        compiled = kernel.warmup(grid=(1,), **mocked, num_stages=stages)
        if compiled.metadata.shared <= SHARED[about["chip"]] * 1024:
            break
    name = kernel.fn.__name__.removeprefix("basis_attention_").removesuffix("_kernel")
    found = read_amd(compiled.asm) if amd else read_nvidia(compiled.asm, instructions)
    lanes, loop = tiles.warps * (64 if amd else 32), found.pop("loop")
    if instructions:
        found["instructions a score"] = round(loop * lanes / (tiles.queries * tiles.keys), 2)
    row = {"kernel": name, "tile": [tiles.queries, tiles.keys, tiles.warps, stages], "shared": compiled.metadata.shared}
    rows.append(about | row | found)
    print(json.dumps(rows[-1]), flush=True)


def read_nvidia(asm: dict[str, Any], instructions: bool) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, instructions of the innermost loop (if they're counted)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        line = [TOOLS / "cuobjdump", "-res-usage", *(["-sass"] if instructions else []), file.name]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^/]+);", said)]
    targets = [(re.findall(r"BRA\S* .*?0x([0-9a-f]+)", what), at) for at, what in lines]
    loops = [(int(to[0], 16), at) for to, at in targets if to and int(to[0], 16) < at]
    inner = [
        one for one in loops if not any(other != one and one[0] <= other[0] <= other[1] <= one[1] for other in loops)
    ]
    length = max((sum(start <= at <= end for at, _ in lines) for start, end in inner), default=0)
    return {"registers": int(registers), "spilled": int(stack), "loop": length}


def read_amd(asm: dict[str, Any]) -> dict[str, int]:
    """The same of AMD's."""
    code = asm["amdgcn"]
    (registers,), (spilled,) = (re.findall(rf"\.{key}: *(\d+)", code) for key in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": int(registers), "spilled": 4 * int(spilled), "loop": 0}  # AMD's assembler isn't read


def main() -> None:
    """Parse, compile, write."""
    options = tyro.cli(Compiled, description=__doc__)
    rows = options.run()
    if options.output is not None:
        title = f"Triton kernels, D={options.head}, {options.dtype}, E={options.width}"
        text = json.dumps({"title": title, "triton": triton.__version__, "rows": rows}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
