"""The implementations for the CPU, tested alike: outputs and gradients against float64, repeatability, masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat.basis import ACTIVATIONS, BASES, LinearBasis, parse_basis, with_base
from karat.basis.activations import Activation
from karat.basis.fourier import Fourier
from karat.ops import Call, basis_attention
from karat.ops.cpp import attention as cpp
from karat.ops.cpp.task import basis_of
from karat.ops.triton import attention as triton
from support.against_float64 import assert_every_multiple_is_exact, assert_matches, make
from support.implementations import ON_CPU

FOURIER = [f"fourier(grid={grid})" for grid in (1, 3, 5, 11)]
OTHERS = [
    "bspline(grid=5)",
    "bspline(grid=4,order=1,range=2)",
    "bspline(grid=3,order=5)",
    "identity+fourier(grid=2)",
    "silu+fourier(grid=3)",
    "gelu+bspline(grid=4,order=2)",
]
CURVES = [
    "rational",
    "rational(m=1,n=1)",
    "rational(m=3,n=8)",
    "silu+rational(m=8,n=2)",
    "mexican_hat",
    "morlet(omega=2)",
    "gelu+dog",
    "meyer",
    "shannon",
    "identity+shannon(window=key)",
]
LISTED = {parse_basis(spec).parts[1].name for spec in FOURIER + OTHERS + CURVES}
OTHERS += [name for name, kind in BASES.items() if name not in LISTED and issubclass(kind, LinearBasis)]
CURVES += [name for name, kind in BASES.items() if name not in LISTED and not issubclass(kind, LinearBasis)]


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("spec", FOURIER + OTHERS + CURVES)
@pytest.mark.parametrize("per_image", [False, True])
def test_matches_the_definition(impl: str, spec: str, per_image: bool) -> None:
    if impl == "cpp" and spec in BASES and spec not in LISTED and basis_of(parse_basis(spec)) is None:
        pytest.skip("C++ needn't know a basis")
    q, k, u = make(2, 3, 33, 37, 20, spec, 12, per_image)
    assert_matches(q, k, u, spec, impl, bias=torch.randn(1, 3, 33, 37), mask=torch.rand(2, 1, 33, 37) > 0.3)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("E", [1, 2, 12, 16, 17, 24, 64])
def test_any_width(impl: str, E: int) -> None:
    assert_matches(*make(2, 2, 30, 29, 16, 2, E), "fourier(grid=1)", impl)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("spec", ["fourier(grid=2)", "dog"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("per_image", [False, True])
def test_any_share_of_work(impl: str, spec: str, threads: int, B: int, H: int, per_image: bool) -> None:
    """One (image, head) for several threads, and heads whose images fall to several."""
    torch.set_num_threads(threads)
    q, k, u = make(B, H, 101, 19, 8, spec, 5, per_image)
    bias = torch.randn(1, H, 1, 19)
    assert_matches(q, k, u, spec, impl, bias=bias)
    leaves = [x.requires_grad_() for x in (q, k, u, bias)]
    runs = []
    for _ in range(2):
        out = basis_attention(q, k, u, spec, bias=bias, impl=impl)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ON_CPU)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_random_shapes(impl: str, data: st.DataObject) -> None:
    """Sizes off the vector width, strides, broadcast bias and mask, any threads, against float64."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    B, H = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    M, N = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    D, E = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 24))
    # But for meyer: near its ends so little of a single number's slope is left that rounding is all of it.
    spec = data.draw(st.sampled_from([spec for spec in FOURIER + OTHERS + CURVES if spec != "meyer"]))
    _, _, u = make(B, H, M, N, D, spec, E, data.draw(st.booleans()))
    if data.draw(st.booleans()):
        u = u.transpose(-1, -2).contiguous().transpose(-1, -2)
    # Queries and keys as timm cuts them from one tensor: (B,N,3,H,D), heads between tokens and features.
    q = torch.randn(B, M, 3, H, D)[:, :, 0].transpose(1, 2)
    k = torch.randn(B, N, 3, H, D)[:, :, 1].transpose(1, 2)
    if data.draw(st.booleans()):
        k = torch.randn(B, H, D, N).transpose(2, 3)

    def broadcast() -> tuple[int, ...]:
        return tuple(size if data.draw(st.booleans()) else 1 for size in (B, H, M, N))

    bias = torch.randn(broadcast()) if data.draw(st.booleans()) else None
    mask = torch.rand(broadcast()) > 0.3 if data.draw(st.booleans()) else None
    assert_matches(q, k, u, spec, impl, bias=bias, mask=mask)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("spec", ["fourier(grid=3)", "rational", "morlet"])
def test_masked_pairs_add_exactly_nothing(impl: str, spec: str) -> None:
    q, k, u = make(1, 2, 9, 21, 8, spec, 4)
    mask = torch.ones(1, 1, 1, 21, dtype=torch.bool)
    mask[..., 13:] = False
    whole = basis_attention(q, k[:, :, :13], u[:, :, :13], spec, impl=impl)
    k[:, :, 13:] = 1e30
    leaves = [x.requires_grad_() for x in (q, k, u)]
    out = basis_attention(*leaves, spec, impl=impl, mask=mask)
    torch.testing.assert_close(out, whole)
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert not k.grad[:, :, 13:].any()
    assert not u.grad[:, :, 13:].any()


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("spec", ["fourier(grid=3)", *OTHERS, *CURVES])
def test_a_query_that_is_nan_spoils_its_own_row_only(impl: str, spec: str) -> None:
    q, k, u = make(1, 1, 9, 21, 8, spec, 4)
    q[0, 0, 3] = float("nan")
    finite = basis_attention(q, k, u, spec, impl=impl).isfinite().all(-1)[0, 0]
    assert finite.tolist() == [row != 3 for row in range(9)]


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    q, k, u = make(2, 2, 17, 19, 16, 2, 12)
    q, k = q.to(dtype), k.to(dtype)
    out = basis_attention(q, k, u, "fourier(grid=1)", impl=impl)
    assert out.dtype == dtype
    full = basis_attention(q.float(), k.float(), u, "fourier(grid=1)", impl=impl)
    assert torch.equal(out, full.to(dtype))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_error_at_the_size_of_a_vit(impl: str, grid: int, dtype: torch.dtype, tolerance: float) -> None:
    """Scores of unit scale; against float64 on the same rounded numbers; twice the same bits."""
    q, k, u = (x.to(dtype) for x in make(2, 2, 197, 197, 64, 2 * grid, 12))
    assert_matches(q, k, u, f"fourier(grid={grid})", impl, tolerance=tolerance)
    leaves = [x.requires_grad_() for x in (q, k, u)]
    runs = []
    for _ in range(2):
        out = basis_attention(*leaves, f"fourier(grid={grid})", impl=impl)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("grid", [1, 3, 5, 6, 11, 16, 64, 300])
def test_every_multiple_of_a_score(impl: str, grid: int) -> None:
    assert_every_multiple_is_exact(grid, impl)


@pytest.mark.parametrize("impl", ON_CPU)
def test_gradients_that_nobody_wants_change_nothing(impl: str) -> None:
    q, k, u = make(1, 2, 40, 41, 16, 6, 12)
    everything = [x.detach().requires_grad_() for x in (q, k, u)]
    wanted = torch.autograd.grad(basis_attention(*everything, "fourier(grid=3)", impl=impl).sum(), everything)
    for alone in range(3):
        inputs = [x.detach().requires_grad_(i == alone) for i, x in enumerate((q, k, u))]
        (got,) = torch.autograd.grad(basis_attention(*inputs, "fourier(grid=3)", impl=impl).sum(), inputs[alone])
        assert torch.equal(got, wanted[alone])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("impl", ON_CPU)
def test_what_pytorch_makes_by_default_changes_nothing(impl: str) -> None:
    """Parts of the gradients of k and bias, one a thread, are memory of the kernel's own kind and place."""
    torch.set_num_threads(2)
    leaves = [x.requires_grad_() for x in (*make(1, 1, 101, 19, 8, 2, 5), torch.randn(1, 1, 1, 19))]
    upstream, runs = torch.ones(1, 1, 101, 5), []
    for way in (nullcontext(), torch.device("meta"), default_dtype(torch.float64), default_dtype(torch.bfloat16)):
        with way:
            out = basis_attention(*leaves[:3], "fourier(grid=1)", bias=leaves[3], impl=impl)
            runs.append([out, *torch.autograd.grad(out, leaves, upstream)])
    assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))


@dataclass(frozen=True)
class Doubled(Fourier):
    """A family of one's own that says no name of its own."""

    def feature_list(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [2 * psi for psi in super().feature_list(x)]

    def write_features(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.features(x))


def test_no_kernel_takes_a_family_of_ones_own_for_what_it_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, u = make(1, 2, 5, 7, 8, 2, 3)
    ours, plain = (basis_attention(q, k, u, family(1)) for family in (Doubled, Fourier))
    torch.testing.assert_close(ours, 2 * plain)
    monkeypatch.setitem(ACTIVATIONS, "square", Activation(torch.square, lambda x: 2 * x))
    for basis in (Doubled(1), with_base(Fourier(1), "square")):
        for kernel, says in ((cpp, "no bases of others"), (triton, "Triton kernels know fourier")):
            assert says in (kernel.unsupported(Call(q, k, 1.0), u, basis) or "")


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5)])
def test_empty_inputs(impl: str, sizes: tuple[int, ...]) -> None:
    B, H, M, N, D = sizes
    leaves = [x.requires_grad_() for x in make(B, H, M, N, D, 2, 3)]
    out = basis_attention(*leaves, "fourier(grid=1)", impl=impl)
    assert out.shape == (B, H, M, 3)
    assert not out.any()
    out.sum().backward()
    for leaf in leaves:
        assert not leaf.grad.any()
