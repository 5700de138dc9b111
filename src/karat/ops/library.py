"""Basis and joint attention as operators of torch.library: autograd, fake tensors, autocast, FLOP counts.

One opaque operator forward and one backward each; inside, a table of implementations. They're what lets torch.compile,
the FLOP counter and autocast see attention as one thing, on every device. Where nothing but autograd looks on, the same
functions are called without the dispatcher, whose detours cost more than a small attention itself.

The operators take tensors and plain settings alone, as their schemas say: those of a Call, u, and v in joint attention
(`_Opened` reads them again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from karat.basis import Basis, parse_basis
from karat.ops import implementations, reference
from karat.ops.call import Call, Gradients
from karat.ops.softmax_part import SoftmaxPart
from karat.ops.transforms import observed, refuse_tangents

_SETTINGS = "str basis, float scale, str impl"
_ALONE = "Tensor q, Tensor k, Tensor u, Tensor? bias, Tensor? mask"
_JOINT = "Tensor q, Tensor k, Tensor v, Tensor u, Tensor? bias, Tensor? mask"


class Operation(NamedTuple):
    """A function, the operator that it is to all who look on, and how many settings follow its tensors."""

    function: Callable[..., Any]
    operator: Any
    settings: int


def operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operation]:
    """Make a function an operator; `fake` gives memory in the shapes of its results.

    Where one of several results isn't there, the function gives None and the operator an empty tensor.
    """

    def register(function: Callable[..., Any]) -> Operation:
        def filled(*inputs: Any) -> Any:
            found = function(*inputs)
            if isinstance(found, Tensor):
                return found
            return tuple([inputs[0].new_empty(0) if x is None else x for x in found])

        operator = torch.library.custom_op(f"karat::{name}", filled, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return Operation(function, operator, sum("Tensor" not in x for x in schema.split(" -> ")[0].split(",")))

    return register


def _memory_of_sums(q: Tensor, k: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], u.shape[-1])


def memory_of_softmax(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For attended (B,H,M,Dv), laid out as (B,M,H,Dv), and logsumexp (B,H,M)."""
    B, H, M, Dv = *q.shape[:3], v.shape[-1]
    attended = q.new_empty_strided((B, H, M, Dv), (M * H * Dv, Dv, H * Dv, 1))
    return attended, q.new_empty(B, H, M, dtype=torch.promote_types(q.dtype, torch.float32))


def _memory_of_both(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    attended, logsumexp = memory_of_softmax(q, v)
    return attended, _memory_of_sums(q, k, u), logsumexp


def memory_of_gradients(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """In the shapes of the inputs that may need them, contiguous; without numbers where none is wanted."""
    *tensors, needs = inputs
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and need else grad.new_empty(0)
        for x, need in zip(tensors, needs, strict=False)
    )


def _memory_of_joint_gradients(grad_attended: Tensor, grad_sums: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return memory_of_gradients(grad_attended, *inputs)


class _Opened(NamedTuple):
    """What an operator was called with."""

    call: Call
    v: Tensor | None
    u: Tensor
    basis: Basis
    impl: str

    @classmethod
    def of(cls, tensors: Sequence[Tensor], basis: str | Basis, scale: float, impl: str) -> _Opened:
        """Of q, k, v if there is one, u, bias, mask."""
        q, k, *v, u, bias, mask = tensors
        return cls(Call(q, k, scale, bias, mask), v[0] if v else None, u, parse_basis(basis), impl)

    def implementation(self) -> implementations.Implementation:
        return implementations.choose(self.impl, self.call, self.u, self.basis, self.v)

    def forward(self, softmax: SoftmaxPart | None = None) -> Tensor:
        with reference.full_precision(self.call.q):
            return self.implementation().forward(self.call, self.u, self.basis, softmax)

    def backward(self, grad: Tensor, needs: Sequence[bool], softmax: SoftmaxPart | None = None) -> Gradients:
        """Gradients of q, k, u, bias."""
        wanted = (needs[0], needs[1], needs[-2], needs[-1])
        with reference.full_precision(self.call.q):
            return self.implementation().backward(grad, self.call, self.u, self.basis, wanted, softmax)


@operator("basis_attention", f"({_ALONE}, {_SETTINGS}) -> Tensor", _memory_of_sums)
def _basis_attention(q: Tensor, k: Tensor, u: Tensor, *rest: Any) -> Tensor:
    """out (B,H,M,E); see `karat.basis_attention`."""
    bias, mask, *settings = rest
    return _Opened.of((q, k, u, bias, mask), *settings).forward()


@operator(
    "basis_attention_backward",
    f"(Tensor grad, {_ALONE}, {_SETTINGS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    memory_of_gradients,
)
def _basis_attention_backward(grad: Tensor, *inputs: Any) -> Gradients:
    """Gradients of q, k, u, bias; None where `needs` says that none is wanted."""
    *tensors, basis, scale, impl, needs = inputs
    return _Opened.of(tensors, basis, scale, impl).backward(grad, needs)


@operator("joint_attention", f"({_JOINT}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)", _memory_of_both)
def _joint_attention(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """attended (B,H,M,Dv), sums (B,H,M,E), logsumexp (B,H,M); see `karat.ops.joint_attention`."""
    bias, mask, *settings = rest
    part = SoftmaxPart(v, *memory_of_softmax(q, v))
    sums = _Opened.of((q, k, v, u, bias, mask), *settings).forward(part)
    return part.attended, sums, part.logsumexp


@operator(
    "joint_attention_backward",
    f"(Tensor grad_attended, Tensor grad_sums, {_JOINT}, Tensor attended, Tensor logsumexp, {_SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _memory_of_joint_gradients,
)
def _joint_attention_backward(grad_attended: Tensor, grad_sums: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, u, bias; None where `needs` says that none is wanted."""
    *tensors, attended, logsumexp, basis, scale, impl, needs = inputs
    v = tensors[2]
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if needs[2] else None
    part = SoftmaxPart(v, attended, logsumexp, grad_attended, dv)
    dq, dk, du, dbias = _Opened.of(tensors, basis, scale, impl).backward(grad_sums, needs, part)
    return dq, dk, dv, du, dbias


Factors = tuple[Tensor, Tensor] | None


def differentiable(
    forward: Operation,
    backward: Operation,
    outputs: int = 1,
    keeping: Callable[..., list[Tensor]] | None = None,
    factored: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Differentiate `forward` by `backward`, once: the operators, and the functions where nothing else looks on.

    Only the first `outputs` of its outputs have gradients. `keeping` says which are kept beside the inputs, given the
    last setting and all of them. What is returned is called as the operators are, but for the basis, which needn't be
    text; settings begin with it. Of several outputs of which one has a gradient it gives that one. `factored` are
    places of tensors that may come with factors, as `factors`: the functions take these as well, operators products.
    """
    settings, alone = forward.settings, keeping is not None and outputs == 1

    def times(tensors: Sequence[Any], factors: Factors) -> list[Any]:
        found = list(tensors)
        for place, factor in zip(factored, factors or (), strict=bool(factors)):
            found[place] = found[place] * factor
        return found

    def keep(
        ctx: Any, inputs: tuple[Any, ...], output: Any, factors: Factors = None, returned: int | None = None
    ) -> None:
        tensors, ctx.settings = inputs[:-settings], inputs[-settings:]
        ctx.sizes = len(tensors), len(factors or ())
        kept: list[Tensor] = []
        if keeping is not None:
            ctx.mark_non_differentiable(*output[outputs:returned])
            ctx.set_materialize_grads(outputs > 1)  # of one output alone there is a gradient, or no need of any
            kept = keeping(ctx.settings[-1], *output)
        ctx.save_for_backward(*tensors, *kept, *(factors or ()))

    def differentiate(ctx: Any, *grads: Any, plain: bool = False) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_tangents(*grads[:outputs])
        saved = ctx.saved_tensors  # asked for once: checkpointing doesn't give them twice
        tensors, count = ctx.sizes
        saved, factors = saved[: len(saved) - count], saved[len(saved) - count :]
        offset = len(ctx.needs_input_grad) - tensors - settings  # of factors, which come first
        needs = list(ctx.needs_input_grad[offset : offset + tensors - 1])  # a mask, the last tensor, has no gradient
        basis, *others = ctx.settings
        looking = () if plain else saved
        if torch.is_grad_enabled() or observed(*looking, *grads[:outputs]):  # a second derivative may be asked for
            products = times(saved, factors)
            gradients = times(backward.operator(*grads[:outputs], *products, str(basis), *others, needs), factors)
        else:
            given = {"factors": factors} if factors else {}
            gradients = backward.function(*grads[:outputs], *saved, basis, *others, needs, **given)
        wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return *wanted, *(None,) * (settings + 1)

    def refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            "basis attention has second derivatives in its reference implementation only; use impl='reference'"
        )

    forward.operator.register_autograd(differentiate, setup_context=keep)
    backward.operator.register_autograd(refuse)

    class Unobserved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, factors: Factors, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward.function(*inputs, **({"factors": factors} if factors else {}))
            keep(ctx, inputs, output, factors, 1 if alone else None)
            return output[0] if alone else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return None, *differentiate(ctx, *grads, plain=True)  # as they were when they were saved

    def call(*inputs: Any, factors: Factors = None) -> Any:
        tensors, (basis, *others) = inputs[:-settings], inputs[-settings:]
        if observed(*tensors, *(factors or ())):
            output = forward.operator(*times(tensors, factors), str(basis), *others)
            return output[0] if alone else output
        return Unobserved.apply(factors, *inputs)

    return call


basis_attention = differentiable(_basis_attention, _basis_attention_backward)
joint_attention = differentiable(
    _joint_attention, _joint_attention_backward, 2, lambda _, attended, sums, logsumexp: [attended, logsumexp]
)

Shape = Sequence[int]


def flops(q: Shape, u: Shape, v: Shape = (0,), *, again: bool = False) -> int:
    """Multiply-adds, 2 each: of scores, D a pair; softmax's product with v, Dv; contraction, F·E.

    Backward (`again`): scores again, dQ and dK; dV and the probabilities' gradient; dU and the features' gradients.
    """
    B, H, M, D = q
    F, N, E = u[-3:]
    return 2 * B * H * M * N * ((3 if again else 1) * D + (2 if again else 1) * (v[-1] + F * E))


@register_flop_formula(torch.ops.karat.basis_attention)
def _(q: Shape, k: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u)


@register_flop_formula(torch.ops.karat.basis_attention_backward)
def _(grad: Shape, q: Shape, k: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u, again=True)


@register_flop_formula(torch.ops.karat.joint_attention)
def _(q: Shape, k: Shape, v: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u, v)


@register_flop_formula(torch.ops.karat.joint_attention_backward)
def _(grad: Shape, grad_sums: Shape, q: Shape, k: Shape, v: Shape, u: Shape, *args: object, **kwargs: object) -> int:
    return flops(q, u, v, again=True)
