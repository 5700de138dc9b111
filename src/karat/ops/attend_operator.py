"""One attend as an operator of torch.library, `karat::attend`; see library.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from karat.basis import Basis, parse_basis
from karat.ops import by_parts, implementations
from karat.ops.call import Call
from karat.ops.library import Factors, Shape, differentiable, flops, memory_of_gradients, operator
from karat.ops.projector import NOTHING, Attended, ProjectedGradients, Projector

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor u, Tensor w, Tensor? gate, Tensor? places, Tensor? bias, Tensor? mask"
_SETTINGS = "str basis, float scale, str impl, bool softmax"


def _memory(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> Attended:
    B, H, M, R, Dv = *q.shape[:3], u.shape[-1], v.shape[-1]
    out = q.new_empty_strided((B, H, M, Dv), (M * H * Dv, Dv, H * Dv, 1))
    kept = R if u.shape[1] else 0  # what is places alone needn't be
    sums = q.new_empty_strided((B, H, M, kept), (H * kept * M, kept * M, 1, M))
    size = (B, H, M) if rest[-1] else (0,)
    return Attended(out, sums, q.new_empty(size, dtype=torch.promote_types(q.dtype, torch.float32)))


def _serving(direction: str, impl: str, call: Call, u: Tensor, basis: Basis, projector: Projector) -> Any:
    """What serves a call, forward or backward: a kernel with the projector inside, or one that is followed by it. No
    kernel is asked for nothing."""
    name = implementations.choice(impl, call, u, basis, projector.v if projector.softmax else None)
    if name in implementations.PROJECTED and 0 not in (call.q.numel(), call.k.numel(), projector.v.numel()):
        return getattr(implementations.load_projected(name), direction)
    return partial(getattr(by_parts, direction), implementations.load(name))


@operator("attend", f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)", _memory)
def _attend(*inputs: Any, factors: Factors = None) -> tuple[Tensor, Tensor, Tensor]:
    """O, sums, logsumexp; see `karat.ops.attend` and `Attended`. Factors are there where no operator is asked."""
    q, k, v, u, w, gate, places, bias, mask, basis, scale, impl, softmax = inputs
    call, basis = Call(q, k, scale, bias, mask), parse_basis(basis) if u.shape[1] else NOTHING
    projector = Projector(v, w, gate, softmax, factors, places)
    into = _memory(*inputs)
    _serving("forward", impl, call, u, basis, projector)(call, u, basis, projector, into)
    return into.out, into.sums, into.logsumexp


@operator(
    "attend_backward",
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor sums, Tensor logsumexp, {_SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    memory_of_gradients,
)
def _attend_backward(grad: Tensor, *inputs: Any, factors: Factors = None) -> ProjectedGradients:
    """Gradients of q, k, v, u, w, gate, places, bias; None where `needs` says that none is wanted."""
    q, k, v, u, w, gate, places, bias, mask, *attended, basis, scale, impl, softmax, needs = inputs
    call, basis = Call(q, k, scale, bias, mask), parse_basis(basis) if u.shape[1] else NOTHING
    projector = Projector(v, w, gate, softmax, factors, places)
    serving = _serving("backward", impl, call, u, basis, projector)
    gradients: ProjectedGradients = serving(grad, call, u, basis, projector, Attended(*attended), needs)
    return gradients


def _kept(softmax: bool, out: Tensor, sums: Tensor, logsumexp: Tensor) -> list[Tensor]:
    return [out if softmax else logsumexp, sums, logsumexp]


attend = differentiable(_attend, _attend_backward, keeping=_kept, factored=(3, 4))


def _products(q: Shape, k: Shape, v: Shape, u: Shape) -> int:
    """Multiply-adds, 2 each, of wᵀ v and of the sums with it; backward each has two."""
    return 2 * q[0] * q[1] * (q[2] + k[2]) * u[-1] * v[-1]


@register_flop_formula(torch.ops.karat.attend)
def _(q: Shape, k: Shape, v: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u, v if args[-1] else (0,)) + _products(q, k, v, u)


@register_flop_formula(torch.ops.karat.attend_backward)
def _(grad: Shape, q: Shape, k: Shape, v: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u, v if args[-2] else (0,), again=True) + 2 * _products(q, k, v, u)
