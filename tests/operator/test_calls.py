"""Calls beside a forward and a backward pass: torch.func, forward mode, empty batches, compilation with open sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from karat import KArAtOperator
from karat.basis import BASES
from karat.operator.fixed import FIXED
from karat.operator.orders import ORDERS
from karat.ops.implementations import IMPLEMENTATIONS

# PyTorch's own forward mode imports what its own compiler deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

B, H, N, D = 3, 2, 5, 4


def spec_of(name: str, has_rank: bool) -> str:
    """Attention of one order, the query's place told where a function for all keys has a rank."""
    rank = "rank=3" if has_rank else "rank=None"
    if name in ("static", "row"):
        return f"{name}-b,{rank}"
    return f"g2b,order={name},{rank}" + (",position=query" if has_rank and name == "Pointwise" else "")


SPECS = [spec_of(*key) for key in ORDERS]
SPECS += [f"{spec},residual=softmax" for spec in SPECS]
SPECS += [f"{basis}-b,rank=3" for basis in BASES] + ["g2b,softmax_heads=1", "g2b,simplex=row", "g2b,simplex=rank"]
MASKS = {
    "none": {},
    "keys": {"mask": torch.tensor([True, True, False, True, True])[None, None, None].expand(B, 1, 1, N)},
    "pairs and bias": {"mask": torch.eye(N, dtype=torch.bool).expand(B, 1, N, N), "bias": torch.ones(B, 1, N, N)},
}


class Attend(nn.Module):
    def __init__(self, spec: str) -> None:
        super().__init__()
        self.op = KArAtOperator(H, N, spec).double()
        for parameter in self.op.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Tensor]) -> Tensor:
        return self.op.attend(q, k, v, **masks)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, B, N, H, D, dtype=torch.float64).transpose(2, 3).unbind()


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("spec", SPECS)
def test_torch_func_sees_through_an_operator(spec: str, masked: str) -> None:
    module, qkv, masks = Attend(spec), inputs(), MASKS[masked]
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}
    names, leaves = list(state), (*state.values(), *qkv)

    def run(*leaves: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, leaves, strict=False)), (*leaves[len(names) :], masks))

    def loss(state: dict[str, Tensor], qkv: tuple[Tensor, ...], masks: dict[str, Tensor]) -> Tensor:
        one = [x.unsqueeze(0) for x in qkv], {name: x.unsqueeze(0) for name, x in masks.items()}
        return functional_call(module, state, (*one[0], one[1])).square().sum()

    directions = tuple(torch.randn_like(x) for x in leaves)
    with torch.no_grad():
        ahead, behind = (run(*(x + e * d for x, d in zip(leaves, directions, strict=True))) for e in (1e-6, -1e-6))
    wanted = (ahead - behind) / 2e-6
    torch.testing.assert_close(jvp(run, leaves, directions)[1], wanted, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        out = run(*map(forward_ad.make_dual, leaves, directions))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, wanted, rtol=1e-5, atol=1e-6)
    # gradients of each image by itself, whose sum is the batch's
    apart = vmap(grad(loss), in_dims=(None, 0, 0))(state, qkv, masks)
    total = torch.autograd.grad(module(*qkv, masks).square().sum(), list(module.parameters()))
    for name, x in zip(names, total, strict=True):
        torch.testing.assert_close(apart[name].sum(0), x)
    along = sum(
        (jacobian * d).flatten(4).sum(-1)
        for jacobian, d in zip(jacrev(run, tuple(range(len(leaves))))(*leaves), directions, strict=True)
    )
    torch.testing.assert_close(along, wanted, rtol=1e-5, atol=1e-6)


CALLS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, q: jvp(f, (q,), (q,)),
    "jacrev": lambda f, q: jacrev(f)(q),
    "vmap": lambda f, q: vmap(f)(q[None]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("residual", ["", ",residual=softmax"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_named_kernel_refuses_what_it_cant_do(impl: str, residual: str, call: str) -> None:
    op = KArAtOperator(H, N, f"g2b,impl={impl}{residual}")
    q, k, v = (x.float() for x in inputs())
    with pytest.raises(ValueError, match=f"impl='{impl}' has gradients alone.*use impl='reference', or 'auto'"):
        CALLS[call](lambda q: op.attend(q, k, v), q)


@pytest.mark.parametrize("impl", ["auto", "tiled"])
@pytest.mark.parametrize("residual", ["", ",residual=softmax"])
def test_no_derivative_of_a_gradient_is_dropped(residual: str, impl: str) -> None:
    op = KArAtOperator(H, N, f"g2b,impl={impl}{residual}")
    q, k, v = (x.float().requires_grad_() for x in inputs())
    out = op.attend(q, k, v)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="use impl='reference'"):
            torch.autograd.grad(out, q, upstream, retain_graph=True)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        torch.autograd.grad(first.sum(), q, retain_graph=True)
    several = torch.randn(4, *out.shape)
    (batched,) = torch.autograd.grad(out, q, several, is_grads_batched=True, retain_graph=True)
    for upstream, x in zip(several, batched, strict=True):
        torch.testing.assert_close(x, torch.autograd.grad(out, q, upstream, retain_graph=True)[0])


@pytest.mark.parametrize("impl", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("spec", SPECS)
def test_an_empty_batch_is_no_special_case(spec: str, impl: str) -> None:
    op = KArAtOperator(H, N, f"{spec},impl={impl}")
    q, k, v = (x[:0].float().requires_grad_() for x in inputs())
    out = op.attend(q, k, v)
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out.sum(), [q, k, v, *op.parameters()], allow_unused=True)
    assert all(x is None or not x.any() for x in gradients)


def test_inputs_lie_as_they_like() -> None:
    op = KArAtOperator(H, N, "g2b").double()
    one = inputs()[0][:1]
    shared = one.expand(B, -1, -1, -1)
    torch.testing.assert_close(op.attend(shared, shared, shared), op.attend(one, one, one).expand(B, -1, -1, -1))


@pytest.mark.parametrize("order", ["g2b", "g2b,order=PhiW", "static-b", "g2b,residual=softmax"])
def test_tensors_that_do_not_fit_are_refused_in_a_line(order: str) -> None:
    op = KArAtOperator(H, N, order)
    q, k, v = (x.float() for x in inputs())
    for wrong in ((q.double(), k, v), (q, k.double(), v), (q, k, v.bfloat16())):
        with pytest.raises(ValueError, match=r"k's dtype"):
            op.attend(*wrong)
    for wrong in ((q, k, v[:1]), (q, k, v[:, :, :4]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="must be"):
            op.attend(*wrong)


@pytest.mark.parametrize("spec", ["g2b", "static-b", "sigmoid"])
def test_what_could_hold_no_output_is_refused(spec: str) -> None:
    """Whole numbers gave whole numbers, zeros; and dropout of a probability below zero none."""
    op, x = KArAtOperator(H, N, spec), torch.ones(B, H, N, D, dtype=torch.long)
    with pytest.raises(ValueError, match=r"scores must be floating point, got torch.int64; write scores.float\(\)"):
        op(torch.ones(B, H, N, N, dtype=torch.long))
    with pytest.raises(ValueError, match=r"q must be floating point, got torch\.int64"):
        op.attend(x, x, x)
    with pytest.raises(ValueError, match=r"scores must be \(B,H,M,N\), got \(2, 5, 5\)"):
        op(torch.randn(H, N, N))
    with pytest.raises(ValueError, match="probability has to be between 0 and 1, but got -1"):
        op.attend(x.float(), x.float(), x.float(), dropout_p=-1)


@pytest.mark.parametrize("spec", [*SPECS, *(name for name in FIXED if name != "diff")])
def test_masks_and_biases_that_do_not_fit_are_refused_in_a_line(spec: str) -> None:
    op = KArAtOperator(H, N, spec).double()
    q, k, v = inputs()
    pairs = torch.ones(N, N, dtype=torch.bool)
    shapes = (pairs[:, :4], pairs.expand(2 * B, 1, N, N), pairs.expand(1, 1, B, H, N, N))
    for wrong, words in (
        *((x, "broadcastable to") for x in shapes),
        (pairs.float(), "boolean"),
        (pairs.int(), "boolean"),
    ):
        for call in (lambda mask: op.attend(q, k, v, mask=mask), lambda mask: op(q @ k.mT, mask)):
            with pytest.raises(ValueError, match=f"mask must be {words}"):
                call(wrong)
    for wrong in shapes:
        with pytest.raises(ValueError, match="bias must be broadcastable to"):
            op.attend(q, k, v, bias=wrong.double())


FLOATS = ["silu+bspline(grid=4,range=2.7)", "morlet(omega=4.7)"]
OTHERS = [pytest.param(basis, marks=pytest.mark.slow) for basis in (*BASES, "gelu+morlet(omega=3.1)")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("residual", ["", ",residual=softmax"])
@pytest.mark.parametrize("basis", [*FLOATS, *OTHERS])
def test_compiles_with_open_sizes_and_settings(basis: str, residual: str) -> None:
    torch.compiler.reset()
    op = KArAtOperator(H, N, f"{basis}-b,rank=3{residual}")
    compiled = torch.compile(op.attend, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        q, k, v = torch.randn(3, batch, H, N, D)
        torch.testing.assert_close(compiled(q, k, v), op.attend(q, k, v))


@pytest.mark.parametrize("spec", ["g3b", "g3b,residual=softmax", "g3b,softmax_heads=1", "rational-b", "recommended"])
def test_on_meta_tensors_there_are_shapes(spec: str) -> None:
    operator = KArAtOperator(H, N, spec).to("meta")
    q = torch.empty(B, H, N, D, device="meta", requires_grad=True)
    out = operator.attend(q, q, q)
    out.sum().backward()
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert q.grad is not None
