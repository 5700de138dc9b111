"""The C++ kernel's numbers: its sine and cosine, outputs and gradients against float64, repeatability."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karat.basis import parse_basis
from karat.ops import basis_attention, cpp_attention, cpp_build

# Without a compiler the kernel can't be tested; with one, a build that fails is a failure.
pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="building the C++ kernel needs c++ and ninja"
)

FOURIER = [f"fourier(grid={grid})" for grid in (1, 3, 5, 11)]
OTHERS = [
    "bspline(grid=5)",
    "bspline(grid=4,order=1,range=2)",
    "bspline(grid=3,order=5)",
    "identity+fourier(grid=2)",
    "silu+fourier(grid=3)",
    "gelu+bspline(grid=4,order=2)",
]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def assert_matches_reference(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    spec: str,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Output and gradients against the definition in float64 on the same numbers."""
    inputs = [x for x in (q, k, u, bias) if x is not None]
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(*q.shape[:3], u.shape[-1])
    results = []
    for (a, b, c, *rest), impl in ((ours, "cpp"), (exact, "reference")):
        out = basis_attention(a, b, c, spec, bias=rest[0] if rest else None, mask=mask, impl=impl)
        results.append([out, *torch.autograd.grad(out, [a, b, c, *rest], grad.to(out.dtype))])
    for name, got, wanted in zip(("out", "dq", "dk", "du", "dbias"), *results, strict=False):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= tolerance, name


def make(B: int, H: int, M: int, N: int, D: int, F: int, E: int, per_image: bool = False) -> tuple[Tensor, ...]:
    shape = (B, H, F, N, E) if per_image else (H, F, N, E)
    return torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(shape)


def parameters_of(spec: str) -> int:
    return parse_basis(spec).num_parameters


def test_the_kernel_is_there() -> None:
    assert cpp_build.library().problem is None


@pytest.mark.parametrize(("largest", "tolerance"), [(4.0, 3e-7), (1e3, 2e-6), (1.6e4, 2e-6), (1e8, 1e-6), (1e38, 1e-6)])
def test_sine_and_cosine(largest: float, tolerance: float) -> None:
    n = 1 << 14
    x = torch.cat([torch.linspace(-largest, largest, n), (torch.rand(n) * 2 - 1) * largest, torch.zeros(16)])
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    cpp_build.library().run("karat_sincos", x.data_ptr(), sine.data_ptr(), cosine.data_ptr(), len(x))
    assert (sine - x.double().sin()).abs().max() <= tolerance
    assert (cosine - x.double().cos()).abs().max() <= tolerance
    assert sine.abs().max() <= 1 + 1e-6


def test_sine_of_what_is_not_finite_is_nan() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0] * 4)
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    cpp_build.library().run("karat_sincos", x.data_ptr(), sine.data_ptr(), cosine.data_ptr(), len(x))
    finite = x.isfinite()
    for values in (sine, cosine):
        assert torch.equal(values.isfinite(), finite)


@pytest.mark.parametrize("spec", FOURIER + OTHERS)
@pytest.mark.parametrize("per_image", [False, True])
def test_matches_the_definition(spec: str, per_image: bool) -> None:
    q, k, u = make(2, 3, 33, 37, 20, parameters_of(spec), 12, per_image)
    assert_matches_reference(q, k, u, spec, bias=torch.randn(1, 3, 33, 37), mask=torch.rand(2, 1, 33, 37) > 0.3)


@pytest.mark.parametrize("E", [1, 2, 12, 16, 17, 24, 64])
def test_any_width(E: int) -> None:
    assert_matches_reference(*make(2, 2, 30, 29, 16, 2, E), "fourier(grid=1)")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("per_image", [False, True])
def test_any_share_of_work(threads: int, B: int, H: int, per_image: bool) -> None:
    """One (image, head) for several threads, and heads whose images fall to several."""
    torch.set_num_threads(threads)
    q, k, u = make(B, H, 101, 19, 8, 4, 5, per_image)
    bias = torch.randn(1, H, 1, 19)
    assert_matches_reference(q, k, u, "fourier(grid=2)", bias=bias)
    leaves = [x.requires_grad_() for x in (q, k, u, bias)]
    runs = []
    for _ in range(2):
        out = basis_attention(q, k, u, "fourier(grid=2)", bias=bias, impl="cpp")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tile", [(1 << 12, 64), (1 << 10, 128)])
def test_many_tiles(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries cut into tiles, the last ones short."""
    monkeypatch.setattr(cpp_attention, "TILE_BYTES", tile[0])
    monkeypatch.setattr(cpp_attention, "TILE_KEYS", tile[1])
    q, k, u = make(1, 2, 131, 300, 24, 6, 12)
    mask = torch.rand(1, 1, 131, 300) > 0.5
    assert_matches_reference(q, k, u, "fourier(grid=3)", bias=torch.randn(1, 1, 131, 300), mask=mask)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    """Sizes off the vector width, strides, broadcast bias and mask, any threads, against float64."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    B, H = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    M, N = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    D, E = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 24))
    spec = data.draw(st.sampled_from(FOURIER + OTHERS))
    _, _, u = make(B, H, M, N, D, parameters_of(spec), E, data.draw(st.booleans()))
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
    assert_matches_reference(q, k, u, spec, bias=bias, mask=mask)


def test_masked_pairs_add_exactly_nothing() -> None:
    q, k, u = make(1, 2, 9, 21, 8, 6, 4)
    mask = torch.ones(1, 1, 1, 21, dtype=torch.bool)
    mask[..., 13:] = False
    whole = basis_attention(q, k[:, :, :13], u[:, :, :13], "fourier(grid=3)", impl="cpp")
    k[:, :, 13:] = 1e30
    leaves = [x.requires_grad_() for x in (q, k, u)]
    out = basis_attention(*leaves, "fourier(grid=3)", impl="cpp", mask=mask)
    torch.testing.assert_close(out, whole)
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert not k.grad[:, :, 13:].any()
    assert not u.grad[:, :, 13:].any()


def test_a_query_that_is_nan_spoils_its_own_row_only() -> None:
    q, k, u = make(1, 1, 9, 21, 8, 6, 4)
    q[0, 0, 3] = float("nan")
    finite = basis_attention(q, k, u, "fourier(grid=3)", impl="cpp").isfinite().all(-1)[0, 0]
    assert finite.tolist() == [row != 3 for row in range(9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, u = make(2, 2, 17, 19, 16, 2, 12)
    q, k = q.to(dtype), k.to(dtype)
    out = basis_attention(q, k, u, "fourier(grid=1)", impl="cpp")
    assert out.dtype == dtype
    full = basis_attention(q.float(), k.float(), u, "fourier(grid=1)", impl="cpp")
    assert torch.equal(out, full.to(dtype))


def test_gradients_that_nobody_wants_change_nothing() -> None:
    q, k, u = make(1, 2, 40, 41, 16, 6, 12)
    everything = [x.detach().requires_grad_() for x in (q, k, u)]
    wanted = torch.autograd.grad(basis_attention(*everything, "fourier(grid=3)", impl="cpp").sum(), everything)
    for alone in range(3):
        inputs = [x.detach().requires_grad_(i == alone) for i, x in enumerate((q, k, u))]
        (got,) = torch.autograd.grad(basis_attention(*inputs, "fourier(grid=3)", impl="cpp").sum(), inputs[alone])
        assert torch.equal(got, wanted[alone])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5)])
def test_empty_inputs(sizes: tuple[int, ...]) -> None:
    B, H, M, N, D = sizes
    leaves = [x.requires_grad_() for x in make(B, H, M, N, D, 2, 3)]
    out = basis_attention(*leaves, "fourier(grid=1)", impl="cpp")
    assert out.shape == (B, H, M, 3)
    assert not out.any()
    out.sum().backward()
    for leaf in leaves:
        assert not leaf.grad.any()


# opcheck itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("spec", ["fourier(grid=1)", "silu+bspline(grid=2,order=2)"])
def test_operator_checks_of_torch_library(spec: str) -> None:
    q, k, u = (x.requires_grad_() for x in make(1, 2, 5, 6, 4, parameters_of(spec), 3))
    bias = torch.randn(1, 2, 5, 6, requires_grad=True)
    mask = torch.rand(1, 1, 5, 6) > 0.3
    torch.library.opcheck(torch.ops.karat.basis_attention.default, (q, k, u, bias, mask, spec, 0.4, "cpp"))
