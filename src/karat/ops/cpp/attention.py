"""Basis and joint attention on the CPU in C++: the kernel of csrc/, built on first use (build.py), in float32.

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
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.ops.cache import cache_bytes
from karat.ops.call import Call, Gradients, Needs, no_gradients
from karat.ops.cpp.build import library
from karat.ops.softmax_part import SoftmaxPart

# A tile's features fill a quarter of a core's second-level cache; a tile has at most so many keys. Both found by
# measurement: benchmarks/tile_size.py.
TILE_BYTES = cache_bytes() // 4
TILE_KEYS = 256

_MAX_ORDER = 5  # of B-splines, as in features.h
_ACTIVATIONS = {"zero": 0, "identity": 1, "silu": 2, "gelu": 3}

_Four = ctypes.c_int64 * 4
_Five = ctypes.c_int64 * 5


class _Basis(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("family", "base", "grid", "order")),
        ("range", ctypes.c_float),
    )


class _Task(ctypes.Structure):
    """The C++ side's `Call`, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "M", "N", "D", "F", "E")),
        *((name, ctypes.c_int64) for name in ("threads", "parts", "tile_queries", "tile_keys", "shared_u", "half")),
        ("basis", _Basis),
        ("scale", ctypes.c_float),
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
    activation, family = basis.parts
    base = _ACTIVATIONS.get(activation)
    if base is not None and isinstance(family, Fourier):
        return _Basis(0, base, family.grid, 0, 0.0)
    if base is not None and isinstance(family, BSpline) and family.order <= _MAX_ORDER:
        return _Basis(1, base, family.grid, family.order, family.range)
    return None


def unsupported(call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
    """Why this kernel can't serve such a call, or None. Builds it, once, if nothing else speaks against it."""
    q = call.q
    if q.device.type != "cpu":
        return f"the C++ kernel runs on the CPU, the tensors are on {q.device}"
    if torch.float64 in (q.dtype, u.dtype):
        return "the C++ kernel computes in float32, the tensors are float64"
    if _basis_of(basis) is None:
        return f"the C++ kernel has fourier and bspline (order <= {_MAX_ORDER}) bases, not {basis}"
    return library().problem


def _stored(q: Tensor) -> torch.dtype:
    """The precision in which the kernel finds queries and the like, and leaves results."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides in elements, zero along axes of size one: those are broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


class _Prepared(NamedTuple):
    task: _Task
    alive: list[Tensor]  # what the task's pointers point to

    def name(self, name: str, x: Tensor) -> None:
        """Tell the task where x lies."""
        self.alive.append(x)
        setattr(self.task, name, x.data_ptr())
        kind, strides = (_Five if name == "u" else _Four), _strides(x)
        if kind is _Five and len(strides) == 4:  # shared by the images
            strides = (0, *strides)
        setattr(self.task, f"{name}_strides", kind(*strides))


def _prepare(call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None, grad: Tensor | None = None) -> _Prepared:
    B, H, M, D = call.q.shape
    F, N, E = u.shape[-3:]
    stored = _stored(call.q)
    task = _Task(B, H, M, N, D, F, E, scale=call.scale, basis=_basis_of(basis), shared_u=u.dim() == 4)
    task.half = stored == torch.bfloat16
    prepared = _Prepared(task, [])
    inputs = [("q", call.q), ("k", call.k), ("u", u), ("bias", call.bias), ("mask", call.mask), ("grad", grad)]
    if softmax is not None:
        inputs += [("v", softmax.v), ("grad_attended", softmax.grad)]
        task.Dv, task.logsumexp = softmax.v.shape[3], softmax.logsumexp.data_ptr()
    for name, x in inputs:
        if x is not None:
            kind = torch.bool if name == "mask" else torch.float32 if name in ("u", "bias") else stored
            prepared.name(name, x.to(kind))
    threads = task.threads = torch.get_num_threads()
    # Where (image, head) pairs are few or fall unevenly on the threads, each is cut into ranges of queries.
    few = 4 * threads > B * H and B * H % threads != 0
    task.parts = max(1, min(threads, M // 32)) if few else 1
    task.tile_keys = TILE_KEYS
    row = 4 * F * min(TILE_KEYS, N)
    task.tile_queries = min(M, max(24, TILE_BYTES // row // 6 * 6))
    return prepared


def _name_attended(task: _Task, softmax: SoftmaxPart) -> Tensor:
    """Softmax's output as the kernel stores it, whose place the task is told: the very tensor where that fits."""
    attended = softmax.attended.to(_stored(softmax.attended))
    task.attended, task.attended_strides = attended.data_ptr(), _Four(*attended.stride())
    return attended


def about() -> str:
    """What this is, in words."""
    return f"C++ ({library().origin})"


def forward(call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None = None) -> Tensor:
    """out (B,H,M,E) in q's precision; see `karat.basis_attention`."""
    out = torch.empty((*call.q.shape[:3], u.shape[-1]), dtype=_stored(call.q))
    if 0 in (out.numel(), call.q.numel(), call.k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        return torch.zeros_like(out, dtype=call.q.dtype)
    task, alive = _prepare(call, u, basis, softmax)
    task.out = out.data_ptr()
    attended = None if softmax is None else _name_attended(task, softmax)
    library().run("karat_forward", task)
    del alive
    if softmax is not None and attended is not None and attended is not softmax.attended:
        softmax.attended.copy_(attended)
    return out.to(call.q.dtype)


def backward(
    grad: Tensor, call: Call, u: Tensor, basis: Basis, needs: Needs, softmax: SoftmaxPart | None = None
) -> Gradients:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    q, k, bias = call.q, call.k, call.bias
    if 0 in (grad.numel(), q.numel(), k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        return no_gradients(call, u, needs)
    task, alive = _prepare(call, u, basis, softmax, grad)
    dv = None
    if softmax is not None:
        alive.append(_name_attended(task, softmax))
        dv = None if softmax.dv is None else torch.empty((task.parts, *softmax.dv.shape), dtype=torch.float32)
    dq = torch.empty(q.shape, dtype=_stored(q)) if needs[0] else None
    dk = torch.empty((task.parts, *k.shape), dtype=torch.float32) if needs[1] else None
    du = torch.empty(u.shape, dtype=torch.float32) if needs[2] else None
    dbias = None
    if bias is not None and needs[3]:
        # One sum a thread, unless each number of it belongs to one thread anyway.
        alone = bias.shape[:2] == q.shape[:2] and (task.parts == 1 or bias.shape[2] == q.shape[2])
        dbias = torch.zeros((1 if alone else task.threads, *bias.shape), dtype=torch.float32)
        task.dbias_strides = _Four(*_strides(dbias)[1:])
        task.dbias_thread_stride = 0 if alone else dbias.stride(0)
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv), ("du", du), ("dbias", dbias)):
        setattr(task, name, None if x is None else x.data_ptr())
    library().run("karat_backward", task)
    del alive
    if softmax is not None and softmax.dv is not None and dv is not None:
        softmax.dv.copy_(_added(dv))
    return Gradients(
        None if dq is None else dq.to(q.dtype),
        None if dk is None else _added(dk).to(k.dtype),
        None if du is None else du.to(u.dtype),
        None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
    )


def _added(parts: Tensor) -> Tensor:
    """The sum over the ranges of queries."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
