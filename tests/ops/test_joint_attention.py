"""Joint attention: softmax and the sums over features from one pass equal the two computed apart, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karat.basis import BASES, parse_basis
from karat.ops import Call, implementations, joint_attention
from karat.ops.cpp import attention as cpp_attention
from karat.ops.cpp import task as cpp_task
from karat.ops.tiled import attention as tiled
from karat.ops.tiled.softmax import RunningSoftmax
from support.against_float64 import relative_error
from support.implementations import COMPILER, ON_CPU, needs_compiler
from support.joint_apart import check, make, some_mask, together, weights_of, well_posed

LINEAR = ["fourier(grid=1)", "fourier(grid=3)", "bspline(grid=4,order=2)", "silu+fourier(grid=2)", "identity+bspline"]
OTHERS = ["dog", "gelu+morlet", "rational(m=2,n=2)"]


@pytest.mark.parametrize("masked", [None, "pairs", "keys"])
@pytest.mark.parametrize("spec", [*LINEAR, *BASES, *OTHERS])
def test_equals_the_two_apart(spec: str, masked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE_NUMBERS, "cpu", 200)  # several tiles even here
    monkeypatch.setitem(tiled.TILE_KEYS, "cpu", 4)
    leaves = make(spec, bias=(1, 3, 7, 9))
    for impl in ("reference", "tiled"):
        check(leaves, spec, impl, some_mask(masked, 2, 7, 9))


@needs_compiler
@pytest.mark.parametrize("masked", [None, "pairs", "keys"])
@pytest.mark.parametrize("spec", LINEAR)
@pytest.mark.parametrize("per_image", [False, True])
def test_cpp_equals_the_two_apart(
    spec: str, per_image: bool, masked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_task, "TILE_KEYS", 64)  # the running maximum moves from tile to tile
    leaves = make(spec, (2, 2, 33, 147, 20, 5, 18), per_image=per_image, bias=(1, 2, 33, 147), dtype=torch.float32)
    check(leaves, spec, "cpp", some_mask(masked, 2, 33, 147), tolerance=1e-5)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    def size(most: int) -> int:
        return data.draw(st.integers(1, most))

    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    torch.set_num_threads(size(2))
    sizes = B, H, M, N, _, _, _ = size(2), size(3), size(40), size(70), size(24), size(14), size(40)
    axes = st.tuples(*(st.sampled_from((1, axis)) for axis in (B, H, M, N)))
    bias, mask = data.draw(st.none() | axes), data.draw(st.none() | axes)
    impl = data.draw(st.sampled_from(["tiled", "cpp"] if COMPILER else ["tiled"]))
    spec = data.draw(st.sampled_from(LINEAR))
    dtype = torch.float32 if impl == "cpp" else torch.float64
    leaves = make(spec, sizes, per_image=data.draw(st.booleans()), bias=bias, dtype=dtype)
    keep = None if mask is None else torch.rand(*mask) > 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled.TILE_NUMBERS, "cpu", 4000 * size(20))
        patch.setitem(tiled.TILE_KEYS, "cpu", 7 * size(10))
        check(well_posed(leaves, spec, keep), spec, impl, keep, tolerance=2e-5 if impl == "cpp" else 1e-9)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("spec", ["fourier(grid=2)", "silu+bspline(grid=2,order=2)", "dog"])
def test_gradcheck(spec: str, impl: str) -> None:
    leaves = [x.requires_grad_() for x in make(spec, (1, 1, 3, 3, 2, 2, 2), bias=(1, 1, 1, 3))]
    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])

    def f(q: Tensor, k: Tensor, v: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return joint_attention(q, k, v, u, spec, bias=bias, mask=mask, impl=impl)

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
def test_rows_without_a_key_are_zero_and_masked_scores_may_be_anything(impl: str) -> None:
    q, k, v, u = make("fourier(grid=2)", dtype=torch.float32)
    mask = torch.rand(7, 9) > 0.4
    mask[2] = False
    wild = torch.where(mask, 0.3, math.nan).expand(1, 1, 7, 9).clone().requires_grad_()
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v, u)]
    attended, sums = joint_attention(*leaves, "fourier(grid=2)", bias=wild, mask=mask, impl=impl)
    wanted = joint_attention(*leaves, "fourier(grid=2)", bias=torch.full((7, 9), 0.3), mask=mask, impl="reference")
    torch.testing.assert_close((attended, sums), wanted)
    assert not attended[:, :, 2].any()
    assert not sums[:, :, 2].any()
    gradients = torch.autograd.grad((attended.sum() + sums.sum()), [*leaves, wild])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, 2].any()
    assert not gradients[-1][..., ~mask].any()


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
def test_scores_far_apart(impl: str) -> None:
    """Without its running maximum the softmax would overflow."""
    leaves = make("fourier(grid=1)", (1, 1, 5, 300, 4, 2, 3), dtype=torch.float32)
    leaves[0] = leaves[0] * 100
    scores = leaves[0].double() @ leaves[1].double().transpose(-2, -1) / 2
    assert scores.max() > 200
    attended, _ = joint_attention(*leaves, "fourier(grid=1)", impl=impl)
    assert relative_error(attended, scores.softmax(-1) @ leaves[2].double()) < 2e-5


@pytest.mark.parametrize("impl", ["reference", *ON_CPU])
def test_probabilities_sum_to_one(impl: str) -> None:
    q, k, v, u = make("fourier(grid=1)", dtype=torch.float32)
    attended, _ = joint_attention(q, k, torch.ones_like(v), u, "fourier(grid=1)", impl=impl)
    torch.testing.assert_close(attended, torch.ones_like(attended))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    q, k, v, u = (x.to(dtype) for x in make("fourier(grid=1)", dtype=torch.float32))
    got = joint_attention(q, k, v, u.float(), "fourier(grid=1)", impl=impl)
    full = joint_attention(q.float(), k.float(), v.float(), u.float(), "fourier(grid=1)", impl=impl)
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(got, full, strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v, u)]
    check(leaves, "fourier(grid=1)", impl, tolerance=2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("impl", ON_CPU)
def test_any_subset_of_gradients_and_twice_the_same_bits(impl: str) -> None:
    torch.set_num_threads(2)
    leaves = make("fourier(grid=2)", (3, 2, 40, 41, 16, 12, 16), bias=(1, 2, 1, 41), dtype=torch.float32)
    wanted = together(leaves, "fourier(grid=2)", None, impl)
    assert all(torch.equal(x, y) for x, y in zip(together(leaves, "fourier(grid=2)", None, impl), wanted, strict=True))
    for alone in range(5):
        inputs = [x.detach().requires_grad_(i == alone) for i, x in enumerate(leaves)]
        out = joint_attention(*inputs[:4], "fourier(grid=2)", bias=inputs[4], impl=impl)
        (got,) = torch.autograd.grad(out, inputs[alone], [weights_of(x).float() for x in out])
        assert torch.equal(got, wanted[2 + alone])


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5, 2, 3), (1, 2, 0, 4, 5, 2, 3), (1, 2, 3, 0, 5, 2, 3)])
def test_empty_inputs(impl: str, sizes: tuple[int, ...]) -> None:
    results = together(make("fourier(grid=1)", sizes, dtype=torch.float32), "fourier(grid=1)", None, impl)
    assert not any(x.any() for x in results)


def test_joins_heads_without_a_copy() -> None:
    q, k, v, u = make("fourier(grid=1)", dtype=torch.float32)
    attended, _ = joint_attention(q, k, v, u, "fourier(grid=1)")
    assert attended.transpose(1, 2).is_contiguous()


def test_second_derivatives_in_the_reference_only() -> None:
    for impl in ("reference", "tiled"):
        q, k, v, u = (x.requires_grad_() for x in make("fourier", (1, 1, 2, 3, 2, 2, 2)))
        attended, sums = joint_attention(q, k, v, u, "fourier", impl=impl)
        (dq,) = torch.autograd.grad(attended.sum() + sums.sum(), q, create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(dq.square().sum(), k)[0].isfinite().all()
            continue
        with pytest.raises(RuntimeError, match="use impl='reference'"):
            torch.autograd.grad(dq.square().sum(), k)


def test_keeps_nothing_of_the_size_of_the_scores() -> None:
    kept: list[Tensor] = []
    q, k, v, u = (x.requires_grad_() for x in make("fourier", (1, 2, 90, 90, 4, 2, 4), dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        joint_attention(q, k, v, u, "fourier")
    assert max(x.numel() for x in kept) < 90 * 90


def test_the_scores_are_computed_once_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax takes the scores that the features were made of, tile for tile."""
    seen = []
    add = RunningSoftmax.add

    def spy(self: RunningSoftmax, tile: object, scores: Tensor, drop: Tensor | None) -> None:
        seen.append(scores.shape)
        add(self, tile, scores, drop)  # type: ignore[arg-type]

    monkeypatch.setattr(RunningSoftmax, "add", spy)
    products = []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args, **kwargs: products.append(1) or baddbmm(*args, **kwargs))
    monkeypatch.setitem(tiled.TILE_KEYS, "cpu", 4)
    joint_attention(*make("fourier"), "fourier", impl="tiled")
    assert len(products) == len(seen) == 3


# opcheck itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("spec", ["fourier", "dog"])
@pytest.mark.parametrize("impl", ["tiled", "auto"])
def test_operator_checks_of_torch_library(spec: str, impl: str) -> None:
    q, k, v, u, bias = (x.requires_grad_() for x in make(spec, bias=(1, 3, 7, 9), dtype=torch.float32))
    arguments = (q, k, v, u, bias, torch.rand(1, 1, 7, 9) > 0.3, spec, 0.4, impl)
    torch.library.opcheck(torch.ops.karat.joint_attention.default, arguments)


def test_the_flop_counter_knows_the_operator() -> None:
    q, k, v, u = (x.requires_grad_() for x in make("fourier(grid=3)"))
    pairs, D, Dv, sums = 2 * 3 * 7 * 9, 5, 6, 6 * 4
    with FlopCounterMode(display=False) as forward:
        attended, out = joint_attention(q, k, v, u, "fourier(grid=3)")
    assert forward.get_total_flops() == 2 * pairs * (D + Dv + sums)
    with FlopCounterMode(display=False) as backward:
        (attended.sum() + out.sum()).backward()
    assert backward.get_total_flops() == 2 * pairs * (3 * D + 2 * Dv + 2 * sums)


def test_autocast_rounds_the_factors_of_the_products() -> None:
    q, k, v, u = make("fourier(grid=2)", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = joint_attention(q, k, v, u, "fourier(grid=2)")
    rounded = joint_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), u, "fourier(grid=2)")
    assert all(torch.equal(x, y) for x, y in zip(out, rounded, strict=True))


@pytest.mark.parametrize("low", ["q", "k", "v", "kv"])
def test_autocast_takes_inputs_of_mixed_precision(low: str) -> None:
    """As norms of q and k leave them where autocast runs norms in float32."""
    q, k, v, u = make("fourier(grid=2)", dtype=torch.float32)
    rounded = joint_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), u, "fourier(grid=2)")
    mixed = [x.bfloat16() if name in low else x for name, x in zip("qkv", (q, k, v), strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = joint_attention(*mixed, u, "fourier(grid=2)")
    assert all(torch.equal(x, y) for x, y in zip(out, rounded, strict=True))


@needs_compiler
@pytest.mark.parametrize("shape", [(65, 32), (197, 64)])
def test_auto_takes_the_kernel_on_a_cpu(shape: tuple[int, int]) -> None:
    N, D = shape
    q, _, v, u = make("fourier(grid=3)", (1, 1, N, N, D, 12, D), dtype=torch.float32)
    assert implementations.choose("auto", Call(q, q, 1.0), u, parse_basis("fourier(grid=3)"), v) is cpp_attention


BAD = {
    "v must be": lambda q, k, v, u: joint_attention(q, k, v[:, :, 1:], u, "fourier"),
    "q and v must have k's dtype": lambda q, k, v, u: joint_attention(q, k, v.float(), u, "fourier"),
    "of at least 1": lambda q, k, v, u: joint_attention(q, k, v[..., :0], u, "fourier"),
    "u must be": lambda q, k, v, u: joint_attention(q, k, v, u[:, :2], "fourier"),
    "unknown impl 'tile'": lambda q, k, v, u: joint_attention(q, k, v, u, "fourier", impl="tile"),
    "can't serve this call": lambda q, k, v, u: joint_attention(q, k, v, u, "fourier", impl="cpp"),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_says_what_to_do(says: str) -> None:
    with pytest.raises(ValueError) as error:
        BAD[says](*make("fourier"))
    assert says in str(error.value)
