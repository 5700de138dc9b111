"""One attend from the sums of an implementation that has no projector in its kernel: the products follow in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis
from karat.ops.call import Call
from karat.ops.implementations import Implementation
from karat.ops.products import shared_backward, shared_forward, tokens_backward, tokens_forward
from karat.ops.projector import Attended, ProjectedGradients, ProjectedNeeds, Projector, gated, unmasked
from karat.ops.reference import full_precision
from karat.ops.softmax_part import SoftmaxPart


def forward(
    implementation: Implementation, call: Call, u: Tensor, basis: Basis, projector: Projector, into: Attended
) -> None:
    """Write what `into` has memory for."""
    u, projector = projector.whole(u)
    with full_precision(call.q):
        v = unmasked(call, projector.v)
        part = SoftmaxPart(v, into.out, into.logsumexp) if projector.softmax else None
        sums = implementation.forward(call, u, basis, part)
        if projector.places is not None:
            sums = sums + projector.places.to(sums.dtype)
        into.sums.copy_(sums)
        projected = gated(shared_forward(projector.w.to(v.dtype).transpose(1, 2), v), projector.gate)
        product = tokens_forward(sums, projected)
        into.out.add_(product) if projector.softmax else into.out.copy_(product)


def backward(
    implementation: Implementation,
    grad: Tensor,
    call: Call,
    u: Tensor,
    basis: Basis,
    projector: Projector,
    attended: Attended,
    needs: ProjectedNeeds,
) -> ProjectedGradients:
    """Gradients, given that of O; contiguous, as a compiler is told."""
    factors = projector.factors
    u, projector = projector.whole(u)
    with full_precision(call.q):
        _, w, gate, softmax, _, places = projector
        v = unmasked(call, projector.v)
        w_t = w.to(v.dtype).transpose(1, 2)
        projected = shared_forward(w_t, v)
        values = gated(projected, gate)
        sums = attended.sums.contiguous()
        dsums, dgated = tokens_backward(grad, sums, values, True, needs[2] or needs[4] or needs[5])
        assert dsums is not None
        dv = dw = dgate = None
        if dgated is not None:
            if gate is not None and needs[5]:
                dgate = (dgated * projected).sum((0, 2, 3)).to(gate.dtype)
            dw, dv = shared_backward(gated(dgated, gate), w_t, v, needs[4], needs[2])
        part = None
        if softmax:
            beside = attended.out - tokens_forward(sums, values)
            part = SoftmaxPart(v, beside, attended.logsumexp, grad, torch.empty_like(v) if needs[2] else None)
        wanted = (needs[0], needs[1], needs[3], needs[7])
        dq, dk, du, dbias = implementation.backward(dsums, call, u, basis, wanted, part)
        if dv is not None:
            dv = unmasked(call, dv if part is None or part.dv is None else dv + part.dv).contiguous()
        dplaces = dsums.sum(0, dtype=places.dtype) if places is not None and needs[6] else None
        dw = None if dw is None else dw.transpose(1, 2).to(w.dtype).contiguous()
        if factors is not None:
            du, dw = (x if x is None else x * factor for x, factor in zip((du, dw), factors, strict=True))
        return ProjectedGradients(dq, dk, dv, du, dw, dgate, dplaces, dbias)
