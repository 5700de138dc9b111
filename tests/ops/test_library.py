"""Basis attention as an operator of torch.library: FLOP counts, compilation, autocast."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from karat import KArAtOperator, basis_attention
from karat.basis import parse_basis
from karat.ops import Call, implementations, joint_attention
from support.implementations import ON_CPU
from support.looker import Looker

B, H, M, N, D, E = 2, 3, 9, 7, 8, 5


def inputs(spec: str, *, per_image: bool = False) -> list[Tensor]:
    shape = (H, parse_basis(spec).num_parameters, N, E)
    u = (B, *shape) if per_image else shape
    return [torch.randn(size).requires_grad_() for size in ((B, H, M, D), (B, H, N, D), u)]


@pytest.mark.parametrize("name", implementations.IMPLEMENTATIONS)
def test_an_implementation_has_every_function(name: str) -> None:
    wanted = {function for function in vars(implementations.Implementation) if not function.startswith("_")}
    assert {"forward", "about"} < wanted
    assert wanted <= set(dir(implementations.load(name)))


@pytest.mark.parametrize("wanted", [*combinations(range(5), 1), (0, 1, 2, 3, 4), (0, 3)])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_the_dispatcher_is_stepped_around_without_a_trace(impl: str, joint: bool, wanted: tuple[int, ...]) -> None:
    """Alone and looked upon: the same bits, and no gradient is worked out that nobody wants."""
    shapes = ((B, H, M, D), (B, H, N, D), (B, H, N, D), (H, 6, N, E), (1, H, M, N))
    leaves = [torch.randn(shape).requires_grad_(place in wanted) for place, shape in enumerate(shapes)]
    leaves = leaves if joint else leaves[:2] + leaves[3:]
    asked: list[tuple[bool, ...]] = []
    results = []
    for way in (nullcontext(), Looker()):
        with pytest.MonkeyPatch.context() as patch, way:
            module = implementations.choose(impl, Call(*leaves[:2], 1.0), leaves[-2], parse_basis("fourier"))
            patch.setattr(module, "backward", _spy(module.backward, asked))
            *qkvu, bias = leaves
            out = (joint_attention if joint else basis_attention)(*qkvu, "fourier", bias=bias, impl=impl)
            outs = out if joint else (out,)
            upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outs]
            needing = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(outs, needing, upstream) if needing else ()
        results.append([*outs, *found])
    assert all(map(torch.equal, *results))
    assert [x.stride() for x in results[0]] == [x.stride() for x in results[1]]
    if needing:
        name = "joint_attention" if joint else "basis_attention"
        assert way.seen == [name, f"{name}_backward"]
        needs = [leaf.requires_grad for leaf in leaves]
        assert asked == [(*needs[:2], *needs[-2:])] * 2


def _spy(backward: Any, asked: list[tuple[bool, ...]]) -> Any:
    def spied(grad: Tensor, call: Call, u: Tensor, basis: Any, needs: Any, softmax: Any = None) -> Any:
        asked.append(tuple(needs))
        return backward(grad, call, u, basis, needs, softmax)

    return spied


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("name", ["basis_attention", "joint_attention", "attend"])
def test_gradients_lie_as_a_compiler_is_told(name: str, impl: str) -> None:
    """A compiled program reads them by what the operators said before, of inputs that lie in whatever way."""
    q, k, v = torch.randn(3, B, N, H, D).transpose(2, 3).unbind()
    u, w, gate, bias = torch.randn(H, 6, N, E), torch.randn(H, N, E), torch.randn(H), torch.randn(N, N, H)
    alone, bias = name == "basis_attention", bias.permute(2, 0, 1)[None]
    tensors = [q, k, *(() if alone else (v,)), u, *((w, gate, w) if name == "attend" else ()), bias, None]
    settings = ("fourier(grid=3)", 0.3, impl, *((True,) if name == "attend" else ()))
    forward, backward = (getattr(torch.ops.karat, f"{name}{end}") for end in ("", "_backward"))

    def gradients(tensors: list[Tensor | None]) -> Any:
        out = forward(*tensors, *settings)
        kept = () if alone else out if name == "attend" else out[::2]
        grads = {"basis_attention": [out], "joint_attention": out[:2], "attend": out[:1]}[name]
        return backward(*grads, *tensors, *kept, *settings, [True] * (len(tensors) - 1))

    found = gradients(tensors)
    with FakeTensorMode() as mode:
        told = gradients([None if x is None else mode.from_tensor(x) for x in tensors])
    assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in told]


def test_results_may_be_written_to() -> None:
    q, k, u = inputs("fourier(grid=3)")
    _, sums = joint_attention(q, k, k, u, "fourier(grid=3)")  # softmax's output is kept for its gradient
    for out in (sums, basis_attention(q, k, u, "fourier(grid=3)")):
        out.mul_(2).sum().backward()


def test_no_numbers_make_no_numbers() -> None:
    q, k, u = (x.to("meta") for x in inputs("fourier(grid=3)"))
    assert basis_attention(q, k, u, "fourier(grid=3)").shape == (B, H, M, E)
    op = KArAtOperator(H, M, "g2b,residual=softmax").to("meta")
    assert op.attend(q, q, q).shape == q.shape


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("spec", ["fourier(grid=3)", "silu+bspline", "rational"])
def test_the_flop_counter_knows_the_operator(spec: str, per_image: bool) -> None:
    q, k, u = inputs(spec, per_image=per_image)
    F, pairs = parse_basis(spec).num_parameters, B * H * M * N
    with FlopCounterMode(display=False) as forward:
        out = basis_attention(q, k, u, spec)
    assert forward.get_total_flops() == 2 * pairs * (D + F * E)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * pairs * (3 * D + 2 * F * E)


@pytest.mark.slow
# torch's own compiler warns of its internals; what is tested is that nothing of ours breaks the graph.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_equals_eager() -> None:
    basis = parse_basis("fourier(grid=2)")
    mask = torch.rand(1, 1, M, N) > 0.3
    leaves = [*inputs("fourier(grid=2)"), torch.randn(1, H, M, N).requires_grad_()]

    def function(q: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> Tensor:
        return basis_attention(2 * q, k, u.sin(), basis, bias=bias, mask=mask).square()

    torch.compiler.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_autocast_rounds_the_factors_of_the_scores() -> None:
    q, k, u = inputs("fourier(grid=2)")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = basis_attention(q, k, u, "fourier(grid=2)")
    assert out.dtype == torch.bfloat16
    rounded = basis_attention(q.bfloat16(), k.bfloat16(), u, "fourier(grid=2)")
    assert torch.equal(out, rounded)
    exact = basis_attention(*(x.detach().double() for x in (q, k, u)), "fourier(grid=2)", impl="reference")
    assert (out.double() - exact).norm() <= 2e-2 * exact.norm()
    gradients = torch.autograd.grad(out.float().sum(), (q, k, u))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def test_autocast_leaves_float64_alone() -> None:
    q, k, u = (x.detach().double() for x in inputs("dog"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert basis_attention(q, k, u, "dog").dtype == torch.float64


@pytest.mark.parametrize("impl", ["reference", "tiled", "auto"])
def test_autocast_stops_at_the_scores(impl: str) -> None:
    """Sums and parameters stay in float32: what q and k are rounded to is all that the low precision touches."""
    q, k, u = (x.detach() for x in inputs("fourier(grid=2)"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = basis_attention(q, k, u, "fourier(grid=2)", impl=impl)
    rounded = (q.bfloat16().double(), k.bfloat16().double(), u.double())
    exact = basis_attention(*rounded, "fourier(grid=2)", impl="reference")
    assert (out.double() - exact).norm() <= 2.5e-3 * exact.norm()  # the output's own rounding
