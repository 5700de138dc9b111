"""What the Triton kernels are given: tensors and settings, as they take them, and the size of their tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.ops.call import Call
from karat.ops.softmax_part import SoftmaxPart


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, depth of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# Chosen by what the compiler reports for chips from sm_80 to sm_120 (no register spilled, few instructions a score:
# benchmarks/compiled.py), not yet by the clock; benchmarks/gpu.py sweeps them. A fixed table, as a choice by
# measurement could differ between two runs, and the order of sums with it. A warp has 16 rows at least.
TILES: dict[str, dict[str, Tiles]] = {
    "half": {
        "fwd": Tiles(128, 32, 4, 3),
        "dq": Tiles(32, 32, 2, 3),
        "dkdu": Tiles(32, 64, 4, 2),
        "dbias": Tiles(64, 32, 4, 1),
    },
    "joint": {  # half precision, beside softmax
        "fwd": Tiles(128, 32, 8, 3),
        "dq": Tiles(32, 32, 2, 3),
        "dkdu": Tiles(16, 64, 4, 2),
        "dbias": Tiles(64, 32, 4, 1),
    },
    "few": {  # half precision, few tokens: wide tiles would be empty for the most part
        "fwd": Tiles(32, 16, 1, 3),
        "dq": Tiles(16, 16, 1, 3),
        "dkdu": Tiles(16, 16, 1, 2),
        "dbias": Tiles(16, 16, 1, 1),
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
WORDS = {"score": True, "key": False}  # a family's settings that are words, as its kernel has them
FEW_TOKENS = 96
LARGE_SHARED_BYTES = 200 << 10  # on chips with less, the widest tiles get smaller
WIDEST = {"half": 128, "joint": 128, "few": 128, "float": 64, "edges": 16}  # outputs of one launch; wider ones are cut


@dataclasses.dataclass(frozen=True)
class Arguments:
    """One pass of basis attention, with softmax beside it or without, and of the backward pass the gradient coming in.

    Letters and shapes as in `karat.basis_attention`; grad (B,H,M,E) in q's dtype.
    """

    call: Call
    u: Tensor
    basis: Basis
    softmax: SoftmaxPart | None = None
    grad: Tensor | None = None

    @property
    def base(self) -> str:
        return self.basis.parts[0]

    @property
    def family(self) -> Basis:
        return self.basis.parts[1]

    @property
    def linear(self) -> bool:
        return isinstance(self.family, LinearBasis)

    @property
    def settings(self) -> tuple[int | float | bool, ...]:
        """The family's fields, in order, as numbers."""
        values = [getattr(self.family, field.name) for field in dataclasses.fields(self.family)]
        return tuple(WORDS[value] if isinstance(value, str) else value for value in values)

    @property
    def leading(self) -> int:
        """Features before the family's own: 1 with a base activation."""
        return int(self.base != "zero")

    @property
    def kind(self) -> str:
        """Key of TILES and WIDEST."""
        if not self.linear or self.call.q.element_size() > 2:
            return "float" if self.linear else "edges"
        if max(self.call.q.shape[2], self.call.k.shape[2]) <= FEW_TOKENS:
            return "few"
        return "half" if self.softmax is None else "joint"

    def tiles(self, kernel: str) -> Tiles:
        """The tiles of a kernel: those of the table, smaller or with more warps where they'd outgrow the chip."""
        tiles = TILES[self.kind][kernel]
        # The axis along which a tile may get smaller: the other one carries the accumulators' rows.
        axis = "queries" if kernel == "dkdu" else "keys"
        half = {axis: max(16, getattr(tiles, axis) // 2)}
        if self.call.bias is not None or self.call.mask is not None:  # their tiles and pointers take registers too
            tiles = tiles._replace(**half)
        values = 0 if self.softmax is None else self.softmax.v.shape[-1]
        if max(self.call.q.shape[-1], values, min(self.u.shape[-1], WIDEST[self.kind])) > 64:
            tiles = tiles._replace(warps=min(8, 2 * tiles.warps), stages=max(1, tiles.stages - 1))
            if self.kind in ("half", "joint", "few"):
                rows = "keys" if kernel == "dkdu" else "queries"
                tiles = tiles._replace(**{rows: max(getattr(tiles, rows), 16 * tiles.warps)})
            if self.kind == "float":
                least = 16 if kernel == "dkdu" else 32
                small = shared_memory(self.call.q.device) < LARGE_SHARED_BYTES
                tiles = tiles._replace(keys=16, queries=min(tiles.queries, least if small else 64))
        return tiles

    def slices(self) -> Iterator[tuple[slice, Arguments]]:
        """The same cut along E into widths that a kernel takes."""
        E, widest = self.u.shape[-1], WIDEST[self.kind]
        for start in range(0, E, widest):
            columns = slice(start, min(start + widest, E))
            yield (
                columns,
                dataclasses.replace(
                    self,
                    u=self.u[..., columns],
                    softmax=None if start else self.softmax,  # it has no E: it goes with the first of them
                    grad=None if self.grad is None else self.grad[..., columns],
                ),
            )

    @property
    def packed(self) -> Tensor:
        """u as the kernels read it: (…,F,N,BE) contiguous, zeros beyond E, in the precision of the products."""
        u, width = self.u, padded(self.u.shape[-1])
        dtype = self.call.q.dtype if self.linear else torch.float32
        if u.shape[-1] == width and u.dtype == dtype and u.is_contiguous():
            return u
        packed = torch.zeros(*u.shape[:-1], width, dtype=dtype, device=u.device)
        packed[..., : u.shape[-1]] = u
        return packed

    @cached_property
    def values(self) -> dict[str, Any]:
        """What all kernels take by name, and what those of the backward pass do where there is a `grad`."""
        (q, k, scale, bias, mask), u, v = self.call, self.packed, self.call.q
        if self.softmax is not None:
            v = self.softmax.v
        mask = None if mask is None else mask.view(torch.uint8)
        run_time = {
            "q": q,
            "k": k,
            "u": u,
            "v": v,
            "bias": q if bias is None else bias,
            "mask": q if mask is None else mask,
            "scale": scale,
            "H": q.shape[1],
            "M": q.shape[2],
            "N": k.shape[2],
            "s_q": q.stride(),
            "s_k": k.stride(),
            "s_u": (0 if u.dim() == 4 else u.stride(0), *u.stride()[-4:-1]),
            "s_v": v.stride(),
            "s_bias": _strides(bias),
            "s_mask": _strides(mask),
        }
        compile_time = {
            "D": q.shape[-1],
            "E": self.u.shape[-1],
            "F": self.basis.num_parameters,
            "DV": v.shape[-1],
            "BD": padded(q.shape[-1]),
            "BE": u.shape[-1],
            "BV": padded(v.shape[-1]),
            "SOFTMAX": self.softmax is not None,
            "FAMILY": self.family.name,
            "BASE": self.base,
            "SETTINGS": self.settings,
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "PRECISION": "tf32x3" if q.is_cuda and q.dtype == torch.float32 and not torch.version.hip else "ieee",
            "SINE": "exact" if q.dtype == torch.float32 else "polynomial" if torch.version.hip else "unit",
        }
        return run_time | compile_time | ({} if self.grad is None else self._backward(self.grad))

    def _backward(self, grad: Tensor) -> dict[str, Any]:
        da, rows = grad, {"logsumexp": grad, "delta": grad}  # anything where there is no softmax
        if self.softmax is not None:
            assert self.softmax.grad is not None
            da = self.softmax.grad.to(self.call.q.dtype)
            rows = {"logsumexp": self.softmax.logsumexp, "delta": self.softmax.delta().contiguous()}
        return {"do": grad, "s_do": grad.stride(), "da": da, "s_da": da.stride(), **rows}


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use."""
    if device.type != "cuda":
        return LARGE_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def padded(width: int) -> int:
    """The next power of two, at least the 16 that a matrix product on tensor cores takes."""
    return max(16, triton.next_power_of_2(width))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
