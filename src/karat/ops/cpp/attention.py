"""Basis and joint attention on the CPU in C++: the kernel of csrc/, built on first use (`cpp_build`), in float32.

Serves the Fourier and the B-spline bases, with or without a base activation. bfloat16 is read and written as it is,
float16 is converted.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis
from karat.basis.activations import LinearBasisWithBase
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.ops.cpp import build as cpp_build
from karat.ops.softmax_part import SoftmaxPart
from karat.ops.tiled.tiling import cache_bytes

# A tile's features fill a quarter of a core's second-level cache; a tile has at most so many keys. Both found by
# measurement: benchmarks/tile_size.py.
TILE_BYTES = cache_bytes() // 4
TILE_KEYS = 256

_MAX_ORDER = 5  # of B-splines, as in features.h
_BASES = {"identity": 1, "silu": 2, "gelu": 3}

_Four = ctypes.c_int64 * 4
_Five = ctypes.c_int64 * 5


class _Basis(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("family", "base", "grid", "order")),
        ("range", ctypes.c_float),
    )


class _Call(ctypes.Structure):
    """The C++ side's `Call`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "M", "N", "D", "F", "E")),
        *((name, ctypes.c_int64) for name in ("threads", "parts", "tile_queries", "tile_keys", "shared_u", "half")),
        ("basis", _Basis),
        *((name, ctypes.c_float) for name in ("scale", "score_gradient")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "u", "bias", "grad", "mask")),
        ("q_strides", _Four),
        ("k_strides", _Four),
        ("u_strides", _Five),
        ("bias_strides", _Four),
        ("mask_strides", _Four),
        ("grad_strides", _Four),
        *((name, ctypes.c_void_p) for name in ("out", "dq", "dk", "du", "dbias")),
        ("dbias_strides", _Four),
        ("dbias_thread_stride", ctypes.c_int64),
        ("Dv", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("v", "grad_attended", "attended", "logsumexp", "dv")),
        ("v_strides", _Four),
        ("attended_strides", _Four),
        ("grad_attended_strides", _Four),
    )


@lru_cache(maxsize=64)
def _basis_of(basis: Basis) -> _Basis | None:
    """The C++ side's description of a basis; None if it doesn't know it."""
    base = 0
    if isinstance(basis, LinearBasisWithBase):
        if basis.activation not in _BASES:
            return None
        base, basis = _BASES[basis.activation], basis.inner
    if isinstance(basis, Fourier):
        return _Basis(0, base, basis.grid, 0, 0.0)
    if isinstance(basis, BSpline) and basis.order <= _MAX_ORDER:
        return _Basis(1, base, basis.grid, basis.order, basis.range)
    return None


def unsupported(q: Tensor, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
    """Why this kernel can't serve such a call, or None. Builds it, once, if nothing else speaks against it."""
    if q.device.type != "cpu":
        return f"the C++ kernel runs on the CPU, the tensors are on {q.device}"
    if torch.float64 in (q.dtype, u.dtype):
        return "the C++ kernel computes in float32, the tensors are float64"
    if _basis_of(basis) is None:
        return f"the C++ kernel has fourier and bspline (order <= {_MAX_ORDER}) bases, not {basis}"
    return cpp_build.library().problem


def _stored(q: Tensor) -> torch.dtype:
    """The precision in which the kernel finds queries and the like, and leaves results."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


class _Prepared(NamedTuple):
    call: _Call
    alive: list[Tensor]  # what the call's pointers point to


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides in elements, zero along axes of size one: those are broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _prepare(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    grad: Tensor | None = None,
    softmax: SoftmaxPart | None = None,
) -> _Prepared:
    B, H, M, D = q.shape
    F, N, E = u.shape[-3:]
    stored = _stored(q)
    call = _Call(B, H, M, N, D, F, E, scale=scale, basis=_basis_of(basis), shared_u=u.dim() == 4)
    call.half = stored == torch.bfloat16
    alive = []
    inputs = [("q", q), ("k", k), ("u", u), ("bias", bias), ("mask", mask), ("grad", grad)]
    if softmax is not None:
        inputs += [("v", softmax.v), ("grad_attended", softmax.grad)]
        call.Dv, call.logsumexp = softmax.v.shape[3], softmax.logsumexp.data_ptr()
        call.score_gradient = softmax.score_gradient
    for name, x in inputs:
        if x is None:
            continue
        if x.dtype != torch.bool:
            x = x.to(torch.float32 if name in ("u", "bias") else stored)
        alive.append(x)
        setattr(call, name, x.data_ptr())
        kind = _Five if name == "u" else _Four
        strides = _strides(x)
        setattr(call, f"{name}_strides", kind(*strides if x.dim() == len(kind()) else (0, *strides)))
    threads = call.threads = torch.get_num_threads()
    # Where (image, head) pairs are few or fall unevenly on the threads, each is cut into ranges of queries.
    few = 4 * threads > B * H and B * H % threads != 0
    call.parts = max(1, min(threads, M // 32)) if few else 1
    call.tile_keys = TILE_KEYS
    row = 4 * F * min(TILE_KEYS, N)
    call.tile_queries = min(M, max(24, TILE_BYTES // row // 6 * 6))
    return _Prepared(call, alive)


def _name_attended(call: _Call, softmax: SoftmaxPart) -> Tensor:
    """Softmax's output as the kernel stores it, whose place the call is told: the very tensor where that fits."""
    attended = softmax.attended.to(_stored(softmax.attended))
    call.attended, call.attended_strides = attended.data_ptr(), _Four(*attended.stride())
    return attended


def forward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    softmax: SoftmaxPart | None = None,
) -> Tensor:
    """out (B,H,M,E) in q's precision; see `karat.basis_attention`."""
    out = torch.empty((*q.shape[:3], u.shape[-1]), dtype=_stored(q))
    if 0 in (out.numel(), q.numel(), k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        return torch.zeros_like(out, dtype=q.dtype)
    call, alive = _prepare(q, k, u, basis, scale, bias, mask, softmax=softmax)
    call.out = out.data_ptr()
    attended = None if softmax is None else _name_attended(call, softmax)
    cpp_build.library().run("karat_forward", call)
    del alive
    if softmax is not None and attended is not None and attended is not softmax.attended:
        softmax.attended.copy_(attended)
    return out.to(q.dtype)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    softmax: SoftmaxPart | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    if 0 in (grad.numel(), q.numel(), k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        dq, dk, du, dbias = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
            for x, need in zip((q, k, u, bias), needs, strict=True)
        )
        return dq, dk, du, dbias
    call, alive = _prepare(q, k, u, basis, scale, bias, mask, grad, softmax)
    dv = None
    if softmax is not None:
        alive.append(_name_attended(call, softmax))
        dv = None if softmax.dv is None else torch.empty((call.parts, *softmax.dv.shape), dtype=torch.float32)
    dq = torch.empty(q.shape, dtype=_stored(q)) if needs[0] else None
    dk = torch.empty((call.parts, *k.shape), dtype=torch.float32) if needs[1] else None
    du = torch.empty(u.shape, dtype=torch.float32) if needs[2] else None
    dbias = None
    if bias is not None and needs[3]:
        # One sum a thread, unless each number of it belongs to one thread anyway.
        alone = bias.shape[:2] == q.shape[:2] and (call.parts == 1 or bias.shape[2] == q.shape[2])
        dbias = torch.zeros((1 if alone else call.threads, *bias.shape), dtype=torch.float32)
        call.dbias_strides = _Four(*_strides(dbias)[1:])
        call.dbias_thread_stride = 0 if alone else dbias.stride(0)
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv), ("du", du), ("dbias", dbias)):
        setattr(call, name, None if x is None else x.data_ptr())
    cpp_build.library().run("karat_backward", call)
    del alive
    if softmax is not None and softmax.dv is not None and dv is not None:
        softmax.dv.copy_(dv[0] if call.parts == 1 else dv.sum(0))
    return (
        None if dq is None else dq.to(q.dtype),
        None if dk is None else (dk[0] if call.parts == 1 else dk.sum(0)).to(k.dtype),
        None if du is None else du.to(u.dtype),
        None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
    )
