"""A call of the Triton kernels: its tensors and settings, as they take them, and the size of their tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from karat.basis import Basis
from karat.ops.softmax_part import SoftmaxPart

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
    softmax: SoftmaxPart | None = None

    @property
    def linear(self) -> bool:
        return self.family.name in LINEAR

    @property
    def settings(self) -> tuple[int | float | bool, ...]:
        """The family's fields, in order, as numbers."""
        values = [getattr(self.family, field.name) for field in dataclasses.fields(self.family)]
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
        values = 0 if self.softmax is None else self.softmax.v.shape[-1]
        if max(self.q.shape[-1], values, min(self.u.shape[-1], WIDEST[self.kind])) > 64:
            tiles = tiles._replace(warps=2 * tiles.warps, stages=max(1, tiles.stages - 1))
            if self.kind == "float":
                tiles = tiles._replace(keys=16)
        return tiles

    def slices(self) -> Iterator[tuple[slice, Call]]:
        """The call cut along E into widths that a kernel takes."""
        E, widest = self.u.shape[-1], WIDEST[self.kind]
        for start in range(0, E, widest):
            part = slice(start, min(start + widest, E))
            # Softmax has no E: it goes with the first of them.
            yield part, dataclasses.replace(self, u=self.u[..., part], softmax=None if start else self.softmax)

    def packed(self) -> Tensor:
        """u as the kernels read it: (…,F,N,BE) contiguous, zeros beyond E, in the precision of the products."""
        u, width = self.u, padded(self.u.shape[-1])
        dtype = self.q.dtype if self.linear else torch.float32
        if u.shape[-1] == width and u.dtype == dtype and u.is_contiguous():
            return u
        packed = torch.zeros(*u.shape[:-1], width, dtype=dtype, device=u.device)
        packed[..., : u.shape[-1]] = u
        return packed

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all kernels take: run-time arguments and compile-time ones."""
        u, v = self.packed(), self.q if self.softmax is None else self.softmax.v
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        run_time = {
            "q": self.q,
            "k": self.k,
            "u": u,
            "v": v,
            "bias": self.q if self.bias is None else self.bias,
            "mask": self.q if mask is None else mask,
            "scale": self.scale,
            "H": self.q.shape[1],
            "M": self.q.shape[2],
            "N": self.k.shape[2],
            "s_q": self.q.stride(),
            "s_k": self.k.stride(),
            "s_u": (0 if u.dim() == 4 else u.stride(0), *u.stride()[-4:-1]),
            "s_v": v.stride(),
            "s_bias": _strides(self.bias),
            "s_mask": _strides(mask),
        }
        compile_time = {
            "D": self.q.shape[-1],
            "E": self.u.shape[-1],
            "F": self.num_parameters,
            "DV": v.shape[-1],
            "BD": padded(self.q.shape[-1]),
            "BE": u.shape[-1],
            "BV": padded(v.shape[-1]),
            "SOFTMAX": self.softmax is not None,
            "FAMILY": self.family.name,
            "BASE": self.base,
            "SETTINGS": self.settings,
            "HAS_MASK": self.mask is not None,
            "PRECISION": "tf32x3" if self.q.is_cuda and self.q.dtype == torch.float32 else "ieee",
            "EXACT": self.q.dtype == torch.float32,
        }
        return run_time, compile_time


def padded(width: int) -> int:
    """The next power of two, at least the 16 that a matrix product on tensor cores takes."""
    return max(16, triton.next_power_of_2(width))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
