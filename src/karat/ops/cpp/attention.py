"""Basis and joint attention on the CPU in C++: the kernel of csrc/, built on first use (build.py), in float32.

Serves all bases of the package, with or without a base activation. bfloat16 is read and written as it is,
float16 is converted. With the projector behind it: attend.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis
from karat.ops.call import Call, Gradients, Needs, no_gradients
from karat.ops.cpp.build import library
from karat.ops.cpp.task import (
    MAX_DEGREE,
    MAX_OMEGA,
    MAX_ORDER,
    Results,
    Values,
    as_read,
    basis_of,
    in_precision,
    stored,
    task,
)
from karat.ops.softmax_part import SoftmaxPart


def unsupported(call: Call, u: Tensor, basis: Basis, v: Tensor | None = None) -> str | None:
    """Why this kernel can't serve such a call, or None. Builds it, once, if nothing else speaks against it."""
    q = call.q
    if q.device.type != "cpu":
        return f"the C++ kernel runs on the CPU, the tensors are on {q.device}"
    if torch.float64 in (q.dtype, u.dtype):
        return "the C++ kernel computes in float32, the tensors are float64"
    if basis_of(basis) is None:
        return (
            f"the C++ kernel has bspline up to order {MAX_ORDER}, rational up to degree {MAX_DEGREE}, morlet up to "
            f"omega {MAX_OMEGA:.0f} and no bases of others, not {basis}"
        )
    return library().problem


def about() -> str:
    """What this is, in words."""
    return f"C++ ({library().origin})"


def forward(call: Call, u: Tensor, basis: Basis, softmax: SoftmaxPart | None = None) -> Tensor:
    """out (B,H,M,E) in q's precision; see `karat.basis_attention`."""
    read, u = as_read(call, u)
    out = read.q.new_empty((*call.q.shape[:3], u.shape[-1]))
    if 0 in (out.numel(), call.q.numel(), call.k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        return torch.zeros_like(out, dtype=call.q.dtype)
    values = None if softmax is None else _values(softmax)
    library().run("karat_forward", task(read, u, basis, out, values))
    if softmax and values and values.attended is not None and values.attended is not softmax.attended:
        softmax.attended.copy_(values.attended)
    return in_precision(out, call.q.dtype)


def backward(
    grad: Tensor, call: Call, u: Tensor, basis: Basis, needs: Needs, softmax: SoftmaxPart | None = None
) -> Gradients:
    """Gradients for q, k, u and bias (`needs` says which), given that of the output, `grad` (B,H,M,E)."""
    if 0 in (grad.numel(), call.q.numel(), call.k.numel()):
        if softmax is not None:
            softmax.see_nothing()
        return no_gradients(call, u, needs)
    read, u_read = as_read(call, u)
    grad = in_precision(grad, read.q.dtype)
    values, wanted_dv = (None, None) if softmax is None else (_values(softmax), softmax.dv)
    v = None if values is None else values.v
    results = Results.of(read, u_read, (*needs[:2], wanted_dv is not None, needs[2], False, False, False, needs[3]), v)
    library().run("karat_backward", task(read, u_read, basis, None, values, grad, results))
    found = results.found(call, u, v)
    if wanted_dv is not None and found.v is not None:
        wanted_dv.copy_(found.v)
    return Gradients(found.q, found.k, found.u, found.bias)


def _values(softmax: SoftmaxPart) -> Values:
    """The very tensors where they have the kernel's precision."""
    kind = stored(softmax.attended)
    grad = None if softmax.grad is None else in_precision(softmax.grad, kind)
    attended, v = in_precision(softmax.attended, kind), in_precision(softmax.v, kind)
    return Values(v, attended, softmax.logsumexp, grad=grad)
