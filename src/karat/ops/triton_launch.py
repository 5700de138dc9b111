"""Shapes, tile sizes and grids: everything between the front door and the kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from karat.basis import Basis
from karat.ops import triton_kernels, triton_kernels_sums

LINEAR = ("fourier", "bspline")


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, depth of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# Chosen by what the compiler reports for Hopper (few spilled registers, shared memory that fits), not yet by the clock;
# benchmarks/gpu.py sweeps them. A fixed table, as a choice by measurement could differ between two runs, and the order
# of sums with it.
TILES: dict[str, dict[str, Tiles]] = {
    "half": {
        "fwd": Tiles(64, 64, 4, 3),
        "dq": Tiles(64, 32, 4, 3),
        "dkdu": Tiles(32, 64, 4, 2),
        "dbias": Tiles(64, 32, 4, 1),
    },
    "float": {
        "fwd": Tiles(64, 32, 4, 2),
        "dq": Tiles(64, 32, 4, 2),
        "dkdu": Tiles(32, 32, 4, 2),
        "dbias": Tiles(32, 32, 4, 1),
    },
    "edges": {  # an edge that isn't linear in u has its monomials and slopes in registers as well
        "fwd": Tiles(64, 16, 4, 2),
        "dq": Tiles(64, 16, 4, 2),
        "dkdu": Tiles(16, 32, 4, 2),
        "dbias": Tiles(64, 16, 4, 1),
    },
}
WIDEST = {"half": 128, "float": 64, "edges": 16}  # outputs of one launch; wider ones are cut
DU_NUMBERS = 1 << 13  # float32 numbers of dU that one program keeps in registers
PROGRAMS_PER_MULTIPROCESSOR = 4
BIAS_NUMBERS = 1 << 24  # most numbers of partial results for the gradient of a bias that images share


@dataclasses.dataclass(frozen=True)
class Call:
    """One basis attention: letters and shapes as in `karat.basis_attention`, the basis split in base and family."""

    q: Tensor
    k: Tensor
    u: Tensor
    base: str
    family: Basis
    scale: float
    bias: Tensor | None
    mask: Tensor | None

    @property
    def linear(self) -> bool:
        return self.family.name in LINEAR

    @property
    def settings(self) -> tuple[int | float | bool, ...]:
        """The family's fields, in order, as numbers."""
        values = [getattr(self.family, field.name) for field in dataclasses.fields(self.family)]  # type: ignore[arg-type]
        return tuple(value == "score" if isinstance(value, str) else value for value in values)

    @property
    def leading(self) -> int:
        """Features before the family's own: 1 with a base activation."""
        return int(self.base != "zero")

    @property
    def num_parameters(self) -> int:
        return self.leading + self.family.num_parameters

    @property
    def kind(self) -> str:
        """Key of TILES and WIDEST."""
        return "edges" if not self.linear else "half" if self.q.element_size() == 2 else "float"

    def tiles(self, kernel: str) -> Tiles:
        tiles = TILES[self.kind][kernel]
        # The axis along which a tile may get smaller: the other one carries the accumulators' rows.
        axis = "queries" if kernel == "dkdu" else "keys"
        half = {axis: max(16, getattr(tiles, axis) // 2)}
        if self.bias is not None or self.mask is not None:  # their tiles and pointers take registers too
            tiles = tiles._replace(**half)
        if max(self.q.shape[-1], min(self.u.shape[-1], WIDEST[self.kind])) > 64:
            tiles = tiles._replace(warps=2 * tiles.warps, stages=max(1, tiles.stages - 1))
            if self.kind == "float":
                tiles = tiles._replace(keys=16)
        return tiles

    def slices(self) -> Iterator[tuple[slice, Call]]:
        """The call cut along E into widths that a kernel takes."""
        E, widest = self.u.shape[-1], WIDEST[self.kind]
        for start in range(0, E, widest):
            part = slice(start, min(start + widest, E))
            yield part, dataclasses.replace(self, u=self.u[..., part])

    def packed(self) -> Tensor:
        """u as the kernels read it: (…,F,N,BE) contiguous, zeros beyond E, in the precision of the products."""
        u, width = self.u, _padded(self.u.shape[-1])
        dtype = self.q.dtype if self.linear else torch.float32
        if u.shape[-1] == width and u.dtype == dtype and u.is_contiguous():
            return u
        packed = torch.zeros(*u.shape[:-1], width, dtype=dtype, device=u.device)
        packed[..., : u.shape[-1]] = u
        return packed

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all kernels take: run-time arguments and compile-time ones."""
        u = self.packed()
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        run_time = {
            "q": self.q,
            "k": self.k,
            "u": u,
            "bias": self.q if self.bias is None else self.bias,
            "mask": self.q if mask is None else mask,
            "scale": self.scale,
            "H": self.q.shape[1],
            "M": self.q.shape[2],
            "N": self.k.shape[2],
            "s_q": self.q.stride(),
            "s_k": self.k.stride(),
            "s_u": (0 if u.dim() == 4 else u.stride(0), *u.stride()[-4:-1]),
            "s_bias": _strides(self.bias),
            "s_mask": _strides(mask),
        }
        compile_time = {
            "D": self.q.shape[-1],
            "E": self.u.shape[-1],
            "F": self.num_parameters,
            "BD": _padded(self.q.shape[-1]),
            "BE": u.shape[-1],
            "FAMILY": self.family.name,
            "BASE": self.base,
            "SETTINGS": self.settings,
            "HAS_MASK": self.mask is not None,
            "PRECISION": "tf32x3" if self.q.is_cuda and self.q.dtype == torch.float32 else "ieee",
            "EXACT": self.q.dtype == torch.float32,
        }
        return run_time, compile_time


def _padded(width: int) -> int:
    """The next power of two, at least the 16 that a matrix product on tensor cores takes."""
    return max(16, triton.next_power_of_2(width))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Launch with the deepest pipeline whose buffers fit into this GPU's shared memory; the result is the same."""
    arguments |= {"BM": tiles.queries, "BN": tiles.keys, "num_warps": tiles.warps}
    with torch.cuda.device_of(arguments["q"]):
        for stages in range(tiles.stages, 0, -1):
            try:
                kernel[(programs,)](**arguments, num_stages=stages)
                return
            except triton.OutOfResources:
                if stages == 1:
                    raise


def _images_per_program(images: int, programs_per_image: int, device: torch.device) -> int:
    """How many images a program sums over: few programs keep partial results small, enough of them fill the chip."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    ranges = max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // programs_per_image)
    return triton.cdiv(images, min(images, ranges))


def forward(call: Call) -> Tensor:
    """out (B,H,M,E) in q's dtype."""
    B, H, M, _ = call.q.shape
    out = call.q.new_empty(B, H, M, call.u.shape[-1])
    if out.numel() == 0 or call.k.shape[2] == 0:
        return out.zero_()
    for columns, part in call.slices():
        run_time, compile_time = part.arguments()
        tiles, target = part.tiles("fwd"), out[..., columns]
        programs = B * H * triton.cdiv(M, tiles.queries)
        constants = {**compile_time, "HAS_BIAS": call.bias is not None}
        kernel = triton_kernels.basis_attention_fwd_kernel
        _launch(kernel, programs, tiles, **run_time, **constants, out=target, s_out=target.stride())
    return out


def backward(
    call: Call, grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for q, k, u and bias, in their dtypes; None where not needed."""
    inputs = (call.q, call.k, call.u, call.bias)
    if 0 in (grad.numel(), call.k.shape[2], call.q.shape[3]):
        dq, dk, du, dbias = (
            torch.zeros_like(x) if x is not None and need else None for x, need in zip(inputs, needs, strict=True)
        )
        return dq, dk, du, dbias
    grad = grad.to(call.q.dtype)
    parts = [_backward(part, grad[..., columns], needs) for columns, part in call.slices()]
    dq, dk, dbias = (_sum([part[i] for part in parts]) for i in (0, 1, 3))
    du = torch.cat([part[2] for part in parts if part[2] is not None], -1) if needs[2] else None
    gradients = (dq, dk, du, dbias)
    dq, dk, du, dbias = (
        None if gradient is None or x is None else gradient.to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    )
    return dq, dk, du, dbias


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    total = parts[0]
    for part in parts[1:]:
        if total is not None and part is not None:
            total = total.to(torch.float32) + part
    return total


def _backward(
    call: Call, grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    run_time, compile_time = call.arguments()
    run_time |= {"do": grad, "s_do": grad.stride()}
    dq = _dq(call, run_time, compile_time) if needs[0] else None
    dk, du = _dk_and_du(call, run_time, compile_time, needs[1], needs[2]) if needs[1] or needs[2] else (None, None)
    dbias = _dbias(call, call.bias, run_time, compile_time) if call.bias is not None and needs[3] else None
    return dq, dk, du, dbias


def _dq(call: Call, run_time: dict[str, Any], compile_time: dict[str, Any]) -> Tensor:
    B, H, M, _ = call.q.shape
    dq, tiles = torch.empty_like(call.q, memory_format=torch.contiguous_format), call.tiles("dq")
    constants = {**compile_time, "HAS_BIAS": call.bias is not None}
    kernel = triton_kernels.basis_attention_bwd_dq_kernel
    programs = B * H * triton.cdiv(M, tiles.queries)
    _launch(kernel, programs, tiles, **run_time, **constants, dq=dq, s_dq=dq.stride())
    return dq


def _groups(call: Call, tiles: Tiles, width: int) -> Iterator[tuple[int, int, int]]:
    """Features whose dU fit into a program's registers together: first unit, units, accumulators.

    A unit is a harmonic with its cos and sin, or one function of a spline; the first group holds the base as well.
    """
    if not call.linear:
        yield 0, 0, call.num_parameters
        return
    each = 2 if call.family.name == "fourier" else 1
    units = call.family.num_parameters // each
    at_once = max(1, DU_NUMBERS * tiles.warps // 4 // (tiles.keys * width * each))
    for first in range(0, units, at_once):
        count = min(at_once, units - first)
        yield first, count, each * count + (call.leading if first == 0 else 0)


def _dk_and_du(
    call: Call, run_time: dict[str, Any], compile_time: dict[str, Any], with_dk: bool, with_du: bool
) -> tuple[Tensor | None, Tensor | None]:
    B, H, N = call.q.shape[0], call.q.shape[1], call.k.shape[2]
    E, tiles = call.u.shape[-1], call.tiles("dkdu")
    blocks = H * triton.cdiv(N, tiles.keys)
    images = 1 if call.u.dim() == 5 else _images_per_program(B, blocks, call.q.device)
    ranges = triton.cdiv(B, images)
    dk = torch.empty_like(call.k, memory_format=torch.contiguous_format) if with_dk else call.k
    shape = (ranges, H, call.num_parameters, N, E)
    du = torch.empty(shape, dtype=torch.float32, device=call.q.device) if with_du else call.u
    arguments = {**run_time, "dk": dk, "s_dk": dk.stride(), "du": du, "B": B, "IMAGES": images}
    constants = {**compile_time, "HAS_BIAS": call.bias is not None, "WITH_DU": with_du}
    groups = list(_groups(call, tiles, compile_time["BE"])) if with_du else [(0, 0, 0)]
    for first, count, slots in groups:
        group = {"FIRST": first, "COUNT": count, "SLOTS": slots, "WITH_DK": with_dk and first == 0}
        kernel = triton_kernels_sums.basis_attention_bwd_dkdu_kernel
        _launch(kernel, ranges * blocks, tiles, **arguments, **constants, **group)
    if with_du and call.u.dim() == 4:
        du = du.sum(0)  # a fixed order, so two runs agree to the bit
    return dk if with_dk else None, du if with_du else None


def _dbias(call: Call, bias: Tensor, run_time: dict[str, Any], compile_time: dict[str, Any]) -> Tensor:
    (B, H, M, _), N, tiles = call.q.shape, call.k.shape[2], call.tiles("dbias")
    blocks_m, blocks_n = triton.cdiv(M, tiles.queries), triton.cdiv(N, tiles.keys)
    over_m, over_n = bias.shape[2] == 1, bias.shape[3] == 1
    kept = (H, blocks_m if over_m else M, blocks_n if over_n else N)
    images = 1
    if bias.shape[0] == 1:
        images = _images_per_program(B, H * blocks_m * blocks_n, call.q.device)
        images = max(images, triton.cdiv(B, max(1, BIAS_NUMBERS // (kept[0] * kept[1] * kept[2]))))
    ranges = triton.cdiv(B, images)
    dbias = torch.empty(ranges, *kept, dtype=torch.float32, device=bias.device)
    arguments = {**run_time, "dbias": dbias, "s_dbias": dbias.stride(), "B": B, "IMAGES": images}
    constants = {**compile_time, "SUM_M": over_m, "SUM_N": over_n}
    kernel = triton_kernels_sums.basis_attention_bwd_dbias_kernel
    _launch(kernel, ranges * H * blocks_m * blocks_n, tiles, **arguments, **constants)
    return dbias.sum_to_size(bias.shape)
