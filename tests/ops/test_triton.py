"""The Triton kernels against the definition in float64: compiled where there is a GPU, interpreted elsewhere.

The interpreter takes milliseconds for every operation on a tile, so sizes are small and tiles smaller.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karat import basis_attention
from karat.basis import Basis, LinearBasis, parse_basis
from karat.ops.triton.attention import FAMILIES
from support.against_float64 import assert_every_multiple_is_exact
from support.triton import (  # pytest finds the mark and the fixture
    DEVICE,
    TOLERANCE,
    arguments,
    launch,
    pytestmark,  # noqa: F401
    small_tiles,  # noqa: F401
)

SPECS = [
    "fourier(grid=1)",
    "fourier(grid=3)",
    "bspline(grid=4)",
    "bspline(grid=2,order=1)",
    "rational(m=3,n=2)",
    *(family.name for family in FAMILIES if family.name not in ("fourier", "bspline", "rational")),
    "shannon(window=key)",
]
WITH_BASE = ["identity+bspline(grid=2,order=2)", "silu+fourier(grid=2)", "gelu+dog"]


def random_inputs(
    basis: Basis,
    sizes: Sequence[int] = (2, 2, 18, 20, 8, 5),
    *,
    per_image: bool = False,
    dtype: torch.dtype = torch.float32,
    bias: Sequence[int] | None = None,
    mask: Sequence[int] | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """q, k (not contiguous), u, bias, and the mask."""
    B, H, M, N, D, E = sizes
    q = torch.randn(B, M, 3, H, D, device=DEVICE, dtype=dtype)[:, :, 1].transpose(1, 2)
    k = torch.randn(B, H, D, N, device=DEVICE, dtype=dtype).transpose(2, 3)
    u = torch.randn(*([B] if per_image else []), H, E, N, basis.num_parameters, device=DEVICE, dtype=dtype)
    u = u.transpose(-3, -1)  # (…,F,N,E), not contiguous either
    if basis.parameters[-1].name == "dilation":
        u.select(-3, -1).abs_().add_(0.5)
    additive = None if bias is None else torch.randn(*bias, device=DEVICE, dtype=dtype)
    return [q, k, u, additive], None if mask is None else torch.rand(*mask, device=DEVICE) > 0.3


def output_and_gradients(
    inputs: Sequence[Tensor | None], basis: Basis, mask: Tensor | None, impl: str, dtype: torch.dtype
) -> list[Tensor]:
    q, k, u, bias = (None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs)
    assert q is not None
    assert k is not None
    assert u is not None
    out = basis_attention(q, k, u, basis, bias=bias, mask=mask, impl=impl)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).cos().to(inputs[0].dtype)  # type: ignore[union-attr]
    leaves = [x for x in (q, k, u, bias) if x is not None]
    return [out, *torch.autograd.grad(out, leaves, weights.to(dtype))]


def check(inputs: list[Tensor | None], basis: Basis, mask: Tensor | None = None) -> None:
    dtype = inputs[0].dtype  # type: ignore[union-attr]
    wanted = output_and_gradients(inputs, basis, mask, "reference", torch.float64)
    got = output_and_gradients(inputs, basis, mask, "triton", dtype)
    for name, x, exact in zip(("out", "dq", "dk", "du", "dbias"), got, wanted, strict=False):
        assert (x.dtype, x.shape) == (dtype, exact.shape)
        error = ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        assert error <= TOLERANCE[dtype], f"{name} of {basis}: {error:.1e}"


@pytest.mark.parametrize("spec", SPECS)
def test_matches_the_definition(spec: str) -> None:
    basis = parse_basis(spec)
    if isinstance(basis, LinearBasis):
        inputs, mask = random_inputs(basis, bias=(1, 2, 18, 20), mask=(2, 1, 18, 20))
    else:  # the interpreter evaluates their edges one by one
        inputs, mask = random_inputs(basis, (2, 1, 9, 18, 8, 3), bias=(1, 1, 9, 18), mask=(2, 1, 9, 18))
    check(inputs, basis, mask)


@pytest.mark.parametrize("grid", [1, 6, 16, 40])
def test_every_multiple_of_a_score(grid: int) -> None:
    with torch.device(DEVICE):
        assert_every_multiple_is_exact(grid, "triton", each=6e-7)  # its sine is within 1e-6


@pytest.mark.parametrize("spec", WITH_BASE)
def test_base_activations_are_one_more_feature(spec: str) -> None:
    basis = parse_basis(spec)
    inputs, mask = random_inputs(basis, (2, 1, 9, 17, 4, 3), mask=(1, 1, 9, 17))
    check(inputs, basis, mask)


@pytest.mark.parametrize("spec", ["fourier(grid=2)", "bspline(grid=2,order=2)", "dog"])
def test_parameters_of_each_image(spec: str) -> None:
    basis = parse_basis(spec)
    check(random_inputs(basis, (2, 2, 7, 17, 8, 18), per_image=True)[0], basis)


# An additive bias may be shared by images, heads, queries or keys.
BIASES = [(2, 2, 18, 20), (1, 1, 18, 20), (1, 2, 1, 20), (2, 1, 18, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_gradient_of_a_shared_bias(shape: tuple[int, ...]) -> None:
    basis = parse_basis("fourier(grid=1)")
    check(random_inputs(basis, bias=shape)[0], basis)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    def size(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    sizes = (size(1, 2), size(1, 2), size(1, 35), size(1, 35), size(1, 20), size(1, 18))
    B, H, M, N = sizes[:4]
    broadcast = st.tuples(*(st.sampled_from((1, axis)) for axis in (B, H, M, N)))
    bias, mask = data.draw(st.none() | broadcast), data.draw(st.none() | broadcast)
    basis = parse_basis(
        data.draw(st.sampled_from(["fourier(grid=1)", "silu+fourier(grid=3)", "bspline(grid=2)", "dog"]))
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    inputs, keep = random_inputs(basis, sizes, per_image=data.draw(st.booleans()), dtype=dtype, bias=bias, mask=mask)
    check(inputs, basis, keep)


def test_features_are_summed_in_groups_and_outputs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DU_NUMBERS", 16 * 16 * 3)
    for kind in arguments.WIDEST:
        monkeypatch.setitem(arguments.WIDEST, kind, 4)
    for spec in ("gelu+fourier(grid=3)", "silu+bspline(grid=2,order=2)", "mexican_hat"):
        basis = parse_basis(spec)
        check(random_inputs(basis, (1, 1, 5, 9, 4, 9), bias=(1, 1, 5, 9))[0], basis)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies bfloat16 wrongly")
@pytest.mark.parametrize("spec", ["fourier(grid=1)", "fourier(grid=3)", "silu+bspline", "rational", "morlet"])
@pytest.mark.parametrize("head", [16, 64, 128])
def test_bfloat16(spec: str, head: int) -> None:
    basis = parse_basis(spec)
    inputs, mask = random_inputs(basis, (3, 2, 197, 197, head, 12), dtype=torch.bfloat16, mask=(1, 1, 197, 197))
    check(inputs, basis, mask)


def test_two_runs_agree_to_the_bit() -> None:
    basis = parse_basis("fourier(grid=2)")
    inputs, mask = random_inputs(basis, bias=(1, 2, 18, 20), mask=(2, 1, 18, 20))
    first, second = (output_and_gradients(inputs, basis, mask, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_masked_scores_may_be_anything() -> None:
    basis = parse_basis("silu+fourier(grid=2)")
    (q, k, u, _), _ = random_inputs(basis, (1, 1, 5, 7, 4, 3))
    assert q is not None
    assert k is not None
    assert u is not None
    mask = torch.rand(1, 1, 5, 7, device=DEVICE) > 0.4
    bias = torch.where(mask, 0.3, torch.nan).requires_grad_()
    out = basis_attention(q, k, u, basis, bias=bias, mask=mask, impl="triton")
    wanted = basis_attention(q, k, u, basis, bias=torch.full_like(bias, 0.3), mask=mask, impl="reference")
    torch.testing.assert_close(out, wanted)
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert gradient[mask].all()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "grid=3" not in spec])
def test_a_query_that_is_nan_spoils_its_own_row_only(spec: str) -> None:
    basis = parse_basis(spec)
    (q, k, u, _), _ = random_inputs(basis, (1, 1, 5, 7, 4, 3))
    assert q is not None
    q[0, 0, 3] = torch.nan
    out = basis_attention(q, k, u, basis, impl="triton")  # type: ignore[arg-type]
    assert out.isfinite().all(-1)[0, 0].tolist() == [row != 3 for row in range(5)]


def test_only_wanted_gradients() -> None:
    basis = parse_basis("fourier(grid=1)")
    inputs, _ = random_inputs(basis, (1, 1, 5, 7, 4, 3))
    wanted = output_and_gradients(inputs, basis, None, "triton", torch.float32)[1:]
    for i in range(3):
        q, k, u = (x.clone().requires_grad_(i == j) for j, x in enumerate(inputs[:3]) if x is not None)
        out = basis_attention(q, k, u, basis, impl="triton")
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).cos()
        (gradient,) = torch.autograd.grad(out, (q, k, u)[i], weights)
        torch.testing.assert_close(gradient, wanted[i])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5, 2), (1, 2, 0, 4, 5, 2), (1, 2, 3, 0, 5, 2)])
def test_empty_inputs(sizes: tuple[int, ...]) -> None:
    basis = parse_basis("fourier(grid=1)")
    inputs, _ = random_inputs(basis, sizes)
    results = output_and_gradients(inputs, basis, None, "triton", torch.float32)
    assert not any(x.any() for x in results)


def test_a_pipeline_too_deep_for_the_chip_gets_shallower() -> None:
    from triton import OutOfResources

    tried = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Kernel:
            return self

        def __call__(self, *, num_stages: int, **arguments: object) -> None:
            tried.append(num_stages)
            if num_stages > fits:
                raise OutOfResources(300_000, 200_000, "shared memory")

    tiles = arguments.Tiles(64, 64, 4, 3)
    fits = 1
    launch._launch(Kernel(), 1, tiles, q=torch.empty(1, device=DEVICE))
    assert tried == [3, 2, 1]
    fits = 0
    with pytest.raises(OutOfResources):
        launch._launch(Kernel(), 1, tiles, q=torch.empty(1, device=DEVICE))


REFUSED = {
    "compiled for a GPU alone": ("fourier", torch.float32, 8, "CUDA device"),
    "double precision": ("fourier", torch.float64, 8, "float32, bfloat16 and float16"),
    "wide heads": ("fourier", torch.float32, 129, "up to 128"),
    "steep splines": ("bspline(order=8)", torch.float32, 8, "up to order 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_serve(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, dtype, head, says = REFUSED[case]
    device = DEVICE
    if says == "CUDA device":
        device = "cpu"
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    basis = parse_basis(spec)
    q, u = (
        torch.randn(1, 1, 3, head, dtype=dtype, device=device),
        torch.randn(1, basis.num_parameters, 3, 2, device=device),
    )
    with pytest.raises(ValueError, match=says) as error:
        basis_attention(q, q, u, basis, impl="triton")
    assert "tiled" in str(error.value)


LAZY = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it isn't installed
import karat, torch
q, u = torch.randn(1, 2, 5, 8), torch.randn(2, 2, 5, 3)
for impl in ("auto", "tiled"):
    karat.basis_attention(q, q, u, "fourier(grid=1)", impl=impl)
try:
    karat.basis_attention(q, q, u, "fourier(grid=1)", impl="triton")
except ValueError as error:
    assert "CUDA device" in str(error), error
loaded = {name for name in sys.modules if name.startswith("karat.ops.triton.")} - {"karat.ops.triton.attention"}
assert not loaded, loaded
"""


def test_nothing_of_triton_is_imported_before_a_call_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    child = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
