"""One attend as one operation: every implementation against the definition in float64, with the projector, the gate,
what the sums begin with, softmax beside it, masks of keys, low precision."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from karat.basis import BASES, parse_basis
from karat.ops import Call, Projector, attend, implementations
from support.against_float64 import relative_error, tamed
from support.implementations import ON_CPU, needs_compiler
from support.looker import Looker

LINEAR = ["fourier(grid=1)", "fourier(grid=3)", "fourier(grid=7)", "silu+fourier(grid=2)", "bspline(grid=4,order=2)"]
SPECS = [*LINEAR, "silu+rational(m=3,n=2)", "mexican_hat"]
WITH_NOTHING = [*SPECS, None]  # no features: the sums are what they begin with
SIZES = ((2, 3, 9, 7, 8, 5, 6), (1, 2, 41, 37, 20, 12, 18), (3, 2, 70, 300, 16, 13, 16))  # B, H, M, N, D, R, Dv
SCALE = 0.3
Inputs = list[Tensor | None]


def draw(
    sizes: tuple[int, ...], spec: str | None, *, gate: bool = True, places: bool = True, bias: bool = True
) -> Inputs:
    """q, k, v as models cut them from one tensor, u, w, gate, places, bias, in float64."""
    B, H, M, N, D, R, Dv = sizes
    q, k, v = (torch.randn(B, n, H, d).transpose(1, 2) for n, d in ((M, D), (N, D), (N, Dv)))
    u = None if spec is None else tamed(torch.randn(H, parse_basis(spec).num_parameters, N, R), spec)
    found = [q, k, v, u, torch.randn(H, N, R), torch.randn(H) if gate else None]
    # Alone they are small, or rounding what they mix would hide softmax, beside which they stand.
    found.append(torch.randn(H, M, R) * (0.02 if spec is None else 1) if places or spec is None else None)
    return [None if x is None else x.double() for x in [*found, torch.randn(1, H, M, N) if bias else None]]


def run(inputs: Inputs, spec: str | None, impl: str, *, softmax: bool, mask: Tensor | None = None) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    q, k, v, u, w, gate, places, bias = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    assert w is not None
    out = attend(Call(q, k, SCALE, bias, mask), u, spec, Projector(v, w, gate, softmax, None, places), impl)
    upstream = torch.linspace(-1, 1, out.numel()).sin().view(*out.transpose(1, 2).shape).transpose(1, 2).to(out.dtype)
    wanted = [x for x in leaves if x is not None]
    return [out, *torch.autograd.grad(out, wanted, upstream, materialize_grads=True)]


def in_precision(inputs: Inputs, dtype: torch.dtype, of_u: torch.dtype | None = None) -> Inputs:
    kinds = [dtype] * 3 + [of_u or dtype] * 5
    return [None if x is None else x.to(kind) for x, kind in zip(inputs, kinds, strict=True)]


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", WITH_NOTHING)
def test_matches_the_definition(spec: str | None, sizes: tuple[int, ...], softmax: bool, impl: str) -> None:
    B, N = sizes[0], sizes[3]
    dtype, tolerance = (torch.float32, 2e-5) if impl == "cpp" else (torch.float64, 1e-9)
    for masked, gate, places, bias in ((0, 1, 1, 1), (1, 1, 0, 0), (1, 0, 1, 1)):
        inputs = in_precision(draw(sizes, spec, gate=gate, places=places, bias=bias), torch.float32)
        mask = torch.rand(B, 1, 1, N) > 0.3 if masked else None
        wanted = run(in_precision(inputs, torch.float64), spec, "reference", softmax=softmax, mask=mask)
        found = run(in_precision(inputs, dtype), spec, impl, softmax=softmax, mask=mask)
        for place, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
            assert ours.shape == exact.shape
            assert relative_error(ours, exact) <= tolerance, place


@pytest.mark.parametrize("basis", BASES)
def test_every_basis_is_served(basis: str) -> None:
    inputs = draw(SIZES[0], basis)
    found, wanted = (run(inputs, basis, impl, softmax=True) for impl in ("auto", "reference"))
    assert all(relative_error(ours, exact) < 1e-9 for ours, exact in zip(found, wanted, strict=True))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("spec", ["fourier(grid=2)", None])
def test_gradcheck(spec: str | None, softmax: bool, impl: str) -> None:
    leaves = [x.requires_grad_() for x in draw((1, 2, 3, 4, 2, 2, 3), spec) if x is not None]
    mask = torch.tensor([True, False, True, True])[None, None, None]

    def f(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        u, w, gate, places, bias = rest if spec else (None, *rest)
        return attend(Call(q, k, SCALE, bias, mask), u, spec, Projector(v, w, gate, softmax, None, places), impl)

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-4)


# opcheck itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("softmax", [False, True])
def test_operator_checks_of_torch_library(softmax: bool, impl: str) -> None:
    leaves = in_precision(draw((1, 2, 5, 6, 4, 3, 4), "fourier(grid=1)"), torch.float32)
    inputs = [None if x is None else x.requires_grad_() for x in leaves]
    mask = torch.rand(1, 1, 1, 6) > 0.3
    arguments = (*inputs, mask, "fourier(grid=1)", SCALE, impl, softmax)
    torch.library.opcheck(torch.ops.karat.attend.default, arguments)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("softmax", [False, True])
def test_looked_upon_or_not_the_bits_are_the_same(softmax: bool, impl: str) -> None:
    inputs = in_precision(draw(SIZES[1], "fourier(grid=3)"), torch.float32)
    looker = Looker()
    alone, watched = [], []
    for way, results in ((nullcontext(), alone), (looker, watched)):
        with way:
            results.extend(run(inputs, "fourier(grid=3)", impl, softmax=softmax))
    assert looker.seen == ["attend", "attend_backward"]
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(alone, watched, strict=True))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(("threads", "B", "H"), [(1, 2, 3), (2, 1, 1), (2, 1, 3), (3, 4, 2), (2, 5, 3)])
@pytest.mark.parametrize("spec", ["fourier(grid=2)", None])
def test_any_share_of_work_gives_the_same_bits_twice(spec: str | None, threads: int, B: int, H: int, impl: str) -> None:
    """Heads whose images fall to several threads, and images whose queries do."""
    torch.set_num_threads(threads)
    inputs = in_precision(draw((B, H, 101, 19, 8, 5, 8), spec), torch.float32)
    wanted = run(in_precision(inputs, torch.float64), spec, "reference", softmax=True)
    first, second = (run(inputs, spec, impl, softmax=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(relative_error(x, y) < 2e-5 for x, y in zip(first, wanted, strict=True))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("spec", ["fourier(grid=2)", None])
def test_any_subset_of_gradients(spec: str | None, impl: str) -> None:
    inputs = in_precision(draw(SIZES[1], spec), torch.float32)
    wanted = run(inputs, spec, impl, softmax=True)[1:]
    for alone in range(len(wanted)):
        q, k, v, u, w, gate, places, bias = fresh = [x if x is None else x.detach() for x in inputs]
        leaf = [x for x in fresh if x is not None][alone].requires_grad_()
        out = attend(Call(q, k, SCALE, bias), u, spec, Projector(v, w, gate, True, None, places), impl)
        shape = out.transpose(1, 2).shape
        (got,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).sin().view(shape).transpose(1, 2))
        torch.testing.assert_close(got, wanted[alone], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
@pytest.mark.parametrize("spec", ["fourier(grid=3)", None])
def test_masked_keys_may_be_anything_and_add_nothing(spec: str | None, impl: str) -> None:
    q, k, v, u, w, gate, places, _ = in_precision(draw(SIZES[0], spec, bias=False), torch.float32)
    few = None if u is None else u[:, :, :5]
    kept = run([q, k[:, :, :5], v[:, :, :5], few, w[:, :5], gate, places, None], spec, impl, softmax=True)
    of_keys = slice(2, 5 if u is None else 6)
    for softmax, filler in product((False, True), (1e30, math.nan)):
        k[:, :, 5:], v[:, :, 5:] = 1e30, filler
        mask = (torch.arange(7) < 5)[None, None, None]
        found = run([q, k, v, u, w, gate, places, None], spec, impl, softmax=softmax, mask=mask)
        assert all(x.isfinite().all() for x in found)
        assert not any(x[..., 5:, :].any() for x in found[of_keys])
        if softmax:
            whole = [*found[:2], *(x[..., :5, :] for x in found[of_keys]), *found[of_keys.stop :]]
            assert all(relative_error(x, y.double()) < 2e-5 for x, y in zip(whole, kept, strict=True))


@pytest.mark.parametrize("impl", ON_CPU)
def test_what_stands_beside_may_lie_in_any_way(impl: str) -> None:
    """Cut from something larger, or one number for all."""
    q, k, v, u, w, gate, places, bias = in_precision(draw(SIZES[0], SPECS[0]), torch.float32)
    assert u is not None
    assert w is not None
    assert gate is not None
    assert places is not None
    cut = [torch.stack([x, x + 1], -1)[..., 0] for x in (u, w, gate, places)]
    one = [u[:1].expand_as(u), w[..., :1].expand_as(w), gate[:1].expand_as(gate), places[:, :1].expand_as(places)]
    for some in (cut, one):
        found = run([q, k, v, *some, bias], SPECS[0], impl, softmax=True)
        wanted = run([q, k, v, *(x.contiguous() for x in some), bias], SPECS[0], impl, softmax=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # said by forward mode itself
@pytest.mark.parametrize("name", ["w", "gate", "places"])
def test_a_tangent_of_what_stands_beside_is_carried_on(name: str) -> None:
    q, k, v, u, w, gate, places, bias = in_precision(draw(SIZES[0], SPECS[0]), torch.float32)
    of = {"w": w, "gate": gate, "places": places}
    with forward_ad.dual_level():
        of[name] = forward_ad.make_dual(of[name], torch.ones_like(of[name]))  # type: ignore[arg-type]
        projector = Projector(v, of["w"], of["gate"], True, None, of["places"])  # type: ignore[arg-type]
        tangent = forward_ad.unpack_dual(attend(Call(q, k, SCALE, bias), u, SPECS[0], projector)).tangent
        assert tangent is not None
        assert tangent.any()
        with pytest.raises(ValueError, match="no forward mode"):
            attend(Call(q, k, SCALE, bias), u, SPECS[0], projector, "tiled")


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float, softmax: bool, impl: str) -> None:
    """Computed in float32 from what is read in place, u and w in float32: as by the definition on the same numbers."""
    inputs = in_precision(draw(SIZES[1], "fourier(grid=2)"), dtype, torch.float32)
    found = run(inputs, "fourier(grid=2)", impl, softmax=softmax)
    wanted = run(in_precision(inputs, torch.float64), "fourier(grid=2)", "reference", softmax=softmax)
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32] * 5
    assert all(relative_error(x, y) < tolerance for x, y in zip(found, wanted, strict=True))


def test_autocast_rounds_queries_keys_and_values() -> None:
    inputs = in_precision(draw(SIZES[1], "fourier(grid=2)"), torch.float32)
    rounded = in_precision(inputs, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, "fourier(grid=2)", "auto", softmax=True)
    wanted = run(rounded, "fourier(grid=2)", "auto", softmax=True)
    assert torch.equal(found[0], wanted[0])
    assert {x.dtype for x in found[1:]} == {torch.float32}
    assert all(torch.equal(x, y.float()) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5, 6, 7), (1, 2, 0, 4, 5, 6, 7)])
def test_nothing_is_attended_to_nothing(sizes: tuple[int, ...], impl: str) -> None:
    inputs = in_precision(draw(sizes, "fourier(grid=1)"), torch.float32)
    out, *gradients = run(inputs, "fourier(grid=1)", impl, softmax=True)
    assert out.shape == (*sizes[:3], sizes[-1])
    assert not any(x.any() for x in gradients)


def test_the_flop_counter_knows_it() -> None:
    B, H, M, N, D, R, Dv = SIZES[1]
    inputs = in_precision(draw(SIZES[1], "fourier(grid=3)"), torch.float32)
    pairs, products = B * H * M * N, B * H * (M + N) * R * Dv
    for softmax in (False, True):
        with FlopCounterMode(display=False) as counter:
            run(inputs, "fourier(grid=3)", "auto", softmax=softmax)
        beside = 3 * Dv if softmax else 0
        assert counter.get_total_flops() == 2 * pairs * (4 * D + 3 * 6 * R + beside) + 6 * products


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.update(w=torch.randn(3, 7, 4)), "w \\(H,N,R\\)"),
        (lambda x: x.update(gate=torch.randn(2)), "each of 3 heads"),
        (lambda x: x.update(mask=torch.ones(2, 1, 9, 7, dtype=torch.bool)), "mask of pairs"),
        (lambda x: x.update(v=torch.randn(2, 3, 8, 6)), "v must be"),
        (lambda x: x.update(places=torch.randn(3, 7, 5)), "places must be \\(H,M,R\\) = \\(3, 9, 5\\)"),
        (lambda x: x.update(u=None, places=None), "places \\(H,M,R\\) must be given"),
    ],
)
def test_what_does_not_fit_is_refused(change: object, words: str) -> None:
    q, k, v, u, w, gate, places, _ = in_precision(draw(SIZES[0], "fourier(grid=1)"), torch.float32)
    asked = {"u": u, "v": v, "w": w, "gate": gate, "mask": None, "places": places}
    change(asked)
    call = Call(q, k, SCALE, None, asked["mask"])
    of = Projector(asked["v"], asked["w"], asked["gate"], False, None, asked["places"])
    with pytest.raises(ValueError, match=words):
        attend(call, asked["u"], "fourier(grid=1)", of)


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_factors_give_the_bits_of_the_products(spec: str, softmax: bool, dtype: torch.dtype, impl: str) -> None:
    q, k, v, u, w, gate, places, _ = in_precision(draw((3, 3, 9, 17, 8, 5, 8), spec), dtype)
    factors = torch.linspace(0.3, 1.7, u.shape[1]).view(-1, 1, 1).to(dtype), torch.tensor(0.7, dtype=dtype)
    mask = torch.arange(17).view(1, 1, 1, -1) != 4

    def both(inside: bool, threads: int, look: bool) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, u, w, gate, places)]
        of = Projector(leaves[2], leaves[4], leaves[5], softmax, factors, leaves[6])
        of_u, of = (leaves[3], of) if inside else of.whole(leaves[3])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with FlopCounterMode(display=False) if look else nullcontext():
                out = attend(Call(leaves[0], leaves[1], SCALE, None, mask), of_u, spec, of, impl)
                return [out, *torch.autograd.grad(out.sum(), leaves)]
        finally:
            torch.set_num_threads(before)

    for threads, look in ((1, False), (2, False), (1, True)):
        for ours, wanted in zip(both(True, threads, look), both(False, threads, look), strict=True):
            assert torch.equal(ours, wanted)


def test_factors_have_their_shapes_and_no_second_derivatives() -> None:
    q, k, v, u, w, *_ = [None if x is None else x.float() for x in draw(SIZES[0], SPECS[1])]
    good = torch.ones(6, 1, 1), torch.tensor(1.0)
    for factors in ((torch.ones(5, 1, 1), good[1]), (torch.ones(6), good[1]), (good[0], torch.ones(1))):
        with pytest.raises(ValueError, match="factors must be"):
            attend(Call(q, k, SCALE), u, SPECS[1], Projector(v, w, None, False, factors))
    leaf = u.requires_grad_()
    out = attend(Call(q, k, SCALE), leaf, SPECS[1], Projector(v, w, None, False, good))
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        first.sum().backward()


@needs_compiler
def test_what_has_no_features_is_the_kernels_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, asked = implementations.load_projected("cpp"), []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda call, *rest: asked.append(call.q.dtype) or forward(call, *rest))
    sizes, served = (1, 2, 5, 6, 4, 3, 4), {"auto": True, "cpp": True, "tiled": False, "reference": False}
    for impl, yes in served.items():
        for dtype, of in ((torch.float32, yes), (torch.bfloat16, yes), (torch.float16, yes), (torch.float64, False)):
            run(in_precision(draw(sizes, None), dtype), None, impl, softmax=True)
            assert bool(asked) == of, (impl, dtype)
            asked.clear()
    run(in_precision(draw(sizes, None), torch.float32), None, "auto", softmax=False)
    run(in_precision(draw((1, 1, 97, 97, 4, 3, 4), None), torch.bfloat16), None, "auto", softmax=True)
    with Looker():
        run(in_precision(draw(sizes, None), torch.float32), None, "auto", softmax=True)
    assert not asked


def test_without_features_nothing_of_ours_is_seen_by_who_looks_on() -> None:
    """A compiler or an exporter finds softmax's own and two products, as numbers agree."""
    inputs = in_precision(draw(SIZES[1], None), torch.float32)
    with Looker() as looker:
        watched = run(inputs, None, "auto", softmax=True)
    alone = run(inputs, None, "auto", softmax=True)
    assert not looker.seen
    assert all(relative_error(x, y.double()) < 2e-5 for x, y in zip(alone, watched, strict=True))


@needs_compiler
@pytest.mark.parametrize("spec", ["fourier(grid=1)", None])
def test_second_derivatives_are_refused_with_the_remedy(spec: str | None) -> None:
    inputs = [None if x is None else x.float().requires_grad_() for x in draw(SIZES[0], spec)]
    q, k, v, u, w, gate, places, bias = inputs
    out = attend(Call(q, k, SCALE, bias), u, spec, Projector(v, w, gate, True, None, places))
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
@pytest.mark.parametrize("name", ["w", "gate", "places", "bias", "mask"])
def test_what_lies_elsewhere_or_is_complex_is_refused(name: str, impl: str) -> None:
    q, k, v, u, w, gate, places, bias = in_precision(draw((2, 2, 5, 5, 4, 3, 4), SPECS[0]), torch.float32)
    of = {"w": w, "gate": gate, "places": places, "bias": bias, "mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}
    here = of[name]
    assert here is not None
    changes = [(here.to("meta"), f"{name} must be on q's device, cpu, got meta")]
    if name != "mask":
        changes.append((here.to(torch.complex64), f"{name} must be real, got torch.complex64"))
    for x, words in changes:
        given = {**of, name: x}
        with pytest.raises(ValueError, match=words):
            attend(
                Call(q, k, SCALE, given["bias"], given["mask"]),
                u,
                SPECS[0],
                Projector(v, given["w"], given["gate"], True, None, given["places"]),
                impl,
            )  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("place", range(5))
def test_numbers_that_are_not_in_memory_yet_are_read_right(place: int, impl: str) -> None:
    inputs = in_precision(draw((2, 2, 5, 5, 4, 3, 4), SPECS[0], gate=False, bias=False), torch.float32)
    x = inputs[place]
    assert x is not None
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    zeros = torch._efficientzerotensor(x.shape)
    assert negated.is_neg()
    for lazy, whole in ((negated, x), (zeros, torch.zeros_like(x))):
        for softmax in (False, True):
            ours, same = ([*inputs[:place], y, *inputs[place + 1 :]] for y in (lazy, whole))
            for found, wanted in zip(
                run(ours, SPECS[0], impl, softmax=softmax), run(same, SPECS[0], impl, softmax=softmax), strict=True
            ):
                assert torch.equal(found, wanted)
