"""One attend in one call of the C++ kernel, the projector inside: WᵀV, its product with the sums, W's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis
from karat.ops.call import Call
from karat.ops.cpp.build import library
from karat.ops.cpp.task import Results, Values, as_read, in_precision, task
from karat.ops.projector import Attended, ProjectedGradients, ProjectedNeeds, Projector


def forward(call: Call, u: Tensor, basis: Basis, projector: Projector, into: Attended) -> None:
    """Write what `into` has memory for."""
    call, u = as_read(call, u)
    values, sums = _values(call, projector, into)
    library().run("karat_forward", task(call, u, basis, sums, values))
    if values.attended is not None and values.attended is not into.out:
        into.out.copy_(values.attended)
        into.sums.copy_(sums)


def backward(
    grad: Tensor,
    call: Call,
    u: Tensor,
    basis: Basis,
    projector: Projector,
    attended: Attended,
    needs: ProjectedNeeds,
) -> ProjectedGradients:
    """Gradients, given that of O."""
    read, u_read = as_read(call, u)
    values, sums = _values(read, projector, attended)
    attended_too = values.attended if projector.softmax else None  # else it isn't kept
    values = values._replace(grad=in_precision(grad, read.q.dtype), attended=attended_too)
    results = Results.of(read, u_read, needs, values.v, values.w, values.gate, values.places)
    library().run("karat_backward", task(read, u_read, basis, sums, values, None, results))
    return results.found(call, u, projector.v, projector.w, projector.gate, projector.places)


def _values(call: Call, projector: Projector, attended: Attended) -> tuple[Values, Tensor]:
    """The very tensors where they have the kernel's precision, and the sums."""
    kind, (v, w, gate, softmax, factors, places) = call.q.dtype, projector
    gate, places = (None if x is None else in_precision(x, torch.float32) for x in (gate, places))
    w, out = in_precision(w, torch.float32), in_precision(attended.out, kind)
    of_u, of_w = factors or (None, None)
    gate, of_u = (None if x is None else x.contiguous() for x in (gate, of_u))
    logsumexp = attended.logsumexp if softmax else None
    values = Values(in_precision(v, kind), out, logsumexp, w, gate, of_u, of_w, places)
    return values, in_precision(attended.sums, kind)
