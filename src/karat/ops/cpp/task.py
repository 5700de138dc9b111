"""What the C++ kernel is told: the numbers of csrc/tile.h's `Call`, packed in its order.

Packed as one string of bytes: to fill a structure field by field would take longer than a small attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.basis.rational import Rational
from karat.basis.wavelets import DerivativeOfGaussian, MexicanHat, Meyer, Morlet, Shannon
from karat.ops.cache import cache_bytes
from karat.ops.call import Call
from karat.ops.projector import NOTHING, ProjectedGradients

# A tile's features fill a quarter of a core's second-level cache; a tile has at most so many keys. Both found by
# measurement: benchmarks/tile_size.py.
TILE_BYTES = cache_bytes() // 4
TILE_KEYS = 256

MAX_ORDER, MAX_DEGREE, MAX_OMEGA = 5, 8, 1000.0  # B-splines, rational, morlet: as in features.h and curves.h
_ACTIVATIONS = {"zero": 0, "identity": 1, "silu": 2, "gelu": 3}

# B, H, M, N, D, F, E; threads, parts, tile_queries, tile_keys, shared_u, half, softmax; basis: family, base, grid,
# order, range; scale; pointers, lengths and strides.
_LAYOUT = Struct("14q 4qf4x f4x 6q 25q 5q 4q 5q 1q 5q 12q 4q 3q 2q 5q")
_NONE = (0, 0, 0, 0)


# How features.h's `Basis` has a family: grid, order, range; None where the kernel lacks that size of it. In the order
# of `enum Family` there. What subclasses one has functions of its own.
_FAMILIES: dict[type[Basis], Callable[[Any], tuple[int, int, float] | None]] = {
    Fourier: lambda basis: (basis.grid, 0, 0.0),
    BSpline: lambda basis: (basis.grid, basis.order, basis.range) if basis.order <= MAX_ORDER else None,
    Rational: lambda basis: (basis.m, basis.n, 0.0) if max(basis.m, basis.n) <= MAX_DEGREE else None,
    MexicanHat: lambda basis: (0, 0, 0.0),
    Morlet: lambda basis: (0, 0, basis.omega) if basis.omega <= MAX_OMEGA else None,
    DerivativeOfGaussian: lambda basis: (0, 0, 0.0),
    Meyer: lambda basis: (0, 0, 0.0),
    Shannon: lambda basis: (basis.window == "score", 0, 0.0),
}
_NUMBERS = {family: number for number, family in enumerate(_FAMILIES)}
# Without features at all: Fourier's none.
_FAMILIES[type(NOTHING)], _NUMBERS[type(NOTHING)] = lambda basis: (0, 0, 0.0), _NUMBERS[Fourier]


@lru_cache(maxsize=64)
def basis_of(basis: Basis) -> tuple[int, int, int, int, float] | None:
    """The C++ side's description of a basis: family, base, grid, order, range; None if it doesn't know it."""
    activation, family = basis.parts
    base, describe = _ACTIVATIONS.get(activation), _FAMILIES.get(type(family))
    described = None if describe is None else describe(family)
    return None if described is None or base is None else (_NUMBERS[type(family)], base, *described)


def stored(q: Tensor) -> torch.dtype:
    """The precision in which the kernel finds queries and the like, and leaves results."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def in_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it has that precision."""
    return x if x.dtype == dtype else x.to(dtype)


def as_read(call: Call, u: Tensor) -> tuple[Call, Tensor]:
    """A call and u in the precision in which the kernel reads them."""
    q, k, scale, bias, mask = call
    kind = stored(q)
    bias = None if bias is None else in_precision(bias, torch.float32)
    return Call(in_precision(q, kind), in_precision(k, kind), scale, bias, mask), in_precision(u, torch.float32)


class Values(NamedTuple):
    """How values go through the kernel: softmax's part, the projector's, or both, as `Call` of csrc says."""

    v: Tensor
    attended: Tensor | None  # softmax's backward pass alone reads it
    logsumexp: Tensor | None = None  # there with softmax
    w: Tensor | None = None
    gate: Tensor | None = None
    of_u: Tensor | None = None  # factors, as Projector says
    of_w: Tensor | None = None
    places: Tensor | None = None  # what the sums begin with; without features they are no more than that
    grad: Tensor | None = None  # of attended


class Results(ProjectedGradients):
    """Memory for gradients, contiguous; float32 where there are parts, whatever torch's own defaults are."""

    __slots__ = ()

    @classmethod
    def of(
        cls,
        call: Call,
        u: Tensor,
        needs: tuple[bool, ...],
        v: Tensor | None,
        w: Tensor | None = None,
        gate: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Results:
        """`needs` says which are wanted, of q, k, v, u, w, gate, places and bias. Those of k and v have parts in front
        where there are several, that of bias always."""
        q, k, _, bias, _ = call
        threads, parts = shares(call)
        dq = _like(q) if needs[0] else None
        dk, dv = (_like(x, parts) if x is not None and need else None for x, need in ((k, needs[1]), (v, needs[2])))
        dbias = None
        if bias is not None and needs[7]:
            # One sum a thread, unless each number of it belongs to one thread anyway.
            alone = bias.shape[:2] == q.shape[:2] and (parts == 1 or bias.shape[2] == q.shape[2])
            dbias = bias.new_zeros((1 if alone else threads, *bias.shape))
        return cls(
            dq,
            dk,
            dv,
            _like(u) if needs[3] else None,
            _like(w) if w is not None and needs[4] else None,
            _like(gate) if gate is not None and needs[5] else None,
            _like(places) if places is not None and needs[6] else None,
            dbias,
        )

    def found(
        self,
        call: Call,
        u: Tensor,
        v: Tensor | None = None,
        w: Tensor | None = None,
        gate: Tensor | None = None,
        places: Tensor | None = None,
    ) -> ProjectedGradients:
        """Parts added up, each in the precision of what it's the gradient of."""
        likes = (call.q, call.k, v, u, w, gate, places, call.bias)
        return ProjectedGradients(*[_fitting(x, like) for x, like in zip(self, likes, strict=True)])


def _like(x: Tensor, parts: int = 1) -> Tensor:
    """Contiguous memory; in half the time that its shape takes through Python, unless there are parts."""
    if parts > 1:
        return x.new_empty((parts, *x.shape), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fitting(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    if gradient is None or x is None:
        return None
    whole = gradient if gradient.dim() == x.dim() else gradient.sum(0)
    return whole if whole.dtype == x.dtype else whole.to(x.dtype)


def shares(call: Call) -> tuple[int, int]:
    """Threads, and into how many ranges of queries each (image, head) is cut: where these are few or fall unevenly on
    the threads."""
    threads, tasks = torch.get_num_threads(), call.q.shape[0] * call.q.shape[1]
    if 4 * threads <= tasks or tasks % threads == 0:
        return threads, 1
    return threads, max(1, min(threads, call.q.shape[2] // 32))


def task(
    call: Call,
    u: Tensor,
    basis: Basis,
    sums: Tensor | None,
    values: Values | None = None,
    grad: Tensor | None = None,
    results: Results | None = None,
) -> bytes:
    """Forward, sums is written; backward, given results, it's read where there is a projector, and `grad` is its
    gradient where there is none. All in the precision that the kernel reads; alive as long as it runs."""
    q, k, scale, bias, mask = call
    B, H, M, D = q.shape
    F, N, E = u.shape[-3:]
    row = 4 * (F or 2) * min(TILE_KEYS, N)  # without features scores and weights
    rows = min(M, max(24, TILE_BYTES // row // 6 * 6))
    shared = u.dim() == 4
    half = q.dtype == torch.bfloat16
    described = basis_of(basis)
    assert described is not None
    v, attended, logsumexp, w, gate, of_u, of_w, places, grad_attended = values or (None,) * 9
    dq, dk, dv, du, dw, dgate, dplaces, dbias = results or (None,) * 8
    return _LAYOUT.pack(
        *(B, H, M, N, D, F, E, *shares(call), rows, TILE_KEYS, shared, half, logsumexp is not None),
        *described,
        scale,
        *(q.data_ptr(), k.data_ptr(), u.data_ptr(), _at(bias), _at(grad), _at(mask)),
        *q.stride(),
        *k.stride(),
        *((0, *u.stride()) if shared else u.stride()),
        *_broadcast(bias),
        *_broadcast(mask),
        *(_NONE if grad is None else grad.stride()),
        *(_at(sums), *(_NONE if sums is None else sums.stride())),
        *(_at(dq), _at(dk), _at(du), _at(dbias)),
        *(_NONE if dbias is None else _broadcast(dbias[0])),
        0 if dbias is None or len(dbias) == 1 else dbias.stride(0),
        0 if v is None else v.shape[3],
        *(_at(v), _at(grad_attended), _at(attended), _at(logsumexp), _at(dv)),
        *(_NONE if v is None else v.stride()),
        *(_NONE if attended is None else attended.stride()),
        *(_NONE if grad_attended is None else grad_attended.stride()),
        *(_at(w), _at(gate), _at(dw), _at(dgate)),
        *((0, 0, 0) if w is None else w.stride()),
        *(_at(of_u), _at(of_w)),
        *(_at(places), _at(dplaces)),
        *((0, 0, 0) if places is None else places.stride()),
    )


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _broadcast(x: Tensor | None) -> tuple[int, ...]:
    """Strides in elements, zero along axes of size one."""
    if x is None:
        return _NONE
    return tuple([0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])
