"""The front door and the tiled path against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karat import basis_attention
from karat.basis import BASES, parse_basis
from karat.ops import basis_contraction
from karat.ops.tiled import attention as tiled

SPECS = [*BASES, "fourier(grid=1)", "silu+fourier(grid=2)", "gelu+dog", "shannon(window=key)", "identity+bspline"]


def inputs(spec: str, *, per_image: bool, M: int = 7, N: int = 9, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    B, H, D, E = 3, 2, 5, 4
    F = parse_basis(spec).num_parameters
    u = (B, H, F, N, E) if per_image else (H, F, N, E)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((B, H, M, D), (B, H, N, D), u)]


def naive(q: Tensor, k: Tensor, u: Tensor, spec: str, scale: float, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Four loops over the formula."""
    basis = parse_basis(spec)
    B, H, M, _ = q.shape
    N, E = u.shape[-2:]
    rows = []
    for b in range(B):
        for h in range(H):
            weights = u[b, h] if u.dim() == 5 else u[h]
            for i in range(M):
                total = torch.zeros(E, dtype=q.dtype)
                for j in range(N):
                    s = scale * (q[b, h, i] @ k[b, h, j])
                    s = s if bias is None else s + bias.expand(B, H, M, N)[b, h, i, j]
                    if mask is None or mask.expand(B, H, M, N)[b, h, i, j]:
                        total = total + basis.edge(s, weights[:, j])
                rows.append(total)
    return torch.stack(rows).view(B, H, M, E)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_reference_is_the_formula(spec: str, per_image: bool) -> None:
    q, k, u = inputs(spec, per_image=per_image, M=3, N=4)
    bias, mask = torch.randn(2, 1, 4, dtype=torch.float64), torch.rand(3, 1, 3, 4) > 0.3
    out = basis_attention(q, k, u, spec, scale=0.3, bias=bias, mask=mask, impl="reference")
    torch.testing.assert_close(out, naive(q, k, u, spec, 0.3, bias.unsqueeze(0), mask))


@pytest.mark.parametrize("masked", [None, "pairs", "keys"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_tiled_equals_reference(
    spec: str, per_image: bool, masked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiled.TILE_NUMBERS, "cpu", 200)  # several tiles even here
    monkeypatch.setitem(tiled.TILE_KEYS, "cpu", 4)
    q, k, u = inputs(spec, per_image=per_image)
    bias = torch.randn(1, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    mask = None if masked is None else torch.rand(3, 1, 7 if masked == "pairs" else 1, 9) > 0.3
    grad = torch.randn(3, 2, 7, 4, dtype=torch.float64)
    results = []
    for impl in ("reference", "tiled"):
        out = basis_attention(q, k, u, spec, bias=bias, mask=mask, impl=impl)
        results.append((out, *torch.autograd.grad(out, (q, k, u, bias), grad)))
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-10 * wanted.norm()


@settings(deadline=None, max_examples=25)
@given(
    M=st.integers(1, 12),
    N=st.integers(1, 12),
    spec=st.sampled_from(SPECS),
    tile=st.tuples(st.integers(1, 400), st.integers(1, 14)),
    per_image=st.booleans(),
    axes=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**31),
)
def test_tiled_over_shapes(
    M: int, N: int, spec: str, tile: tuple[int, int], per_image: bool, axes: tuple[bool, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, u = inputs(spec, per_image=per_image, M=M, N=N)
    shape = [size if whole else 1 for size, whole in zip((3, 2, M, N), axes, strict=True)]
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape) > 0.4
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled.TILE_NUMBERS, "cpu", tile[0])
        patch.setitem(tiled.TILE_KEYS, "cpu", tile[1])
        for impl in ("reference", "tiled"):
            out = basis_attention(q, k, u, spec, bias=bias, mask=mask, impl=impl)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, u, bias))))
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-9 * (wanted.norm() + 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck_of_tiled(spec: str) -> None:
    B, H, M, N, D, E = 1, 1, 2, 3, 2, 2
    q, k = (torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True) for n in (M, N))
    u = torch.randn(H, parse_basis(spec).num_parameters, N, E, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 1, 1, N, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def f(q: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> Tensor:
        return basis_attention(q, k, u, spec, bias=bias, mask=mask, impl="tiled")

    assert torch.autograd.gradcheck(f, (q, k, u, bias), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("spec", ["fourier", "bspline", "morlet", "rational"])
def test_masked_scores_may_be_anything(spec: str) -> None:
    q, k, u = inputs(spec, per_image=False)
    keep = torch.ones(9, dtype=torch.bool)
    keep[4] = False
    broken = k.detach().clone()
    broken[:, :, 4] = math.inf
    for impl in ("reference", "tiled"):
        out = basis_attention(q, broken.requires_grad_(), u, spec, mask=keep, impl=impl)
        wanted = basis_attention(q, k, u, spec, mask=keep, impl=impl)
        torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("spec", SPECS)
def test_large_scores_stay_finite(spec: str, impl: str) -> None:
    q, k, u = inputs(spec, per_image=False, dtype=torch.float32)
    out = basis_attention(q, k, u, spec, scale=1e4 / (q @ k.transpose(-2, -1)).abs().max().item(), impl=impl)
    for value in (out, *torch.autograd.grad(out.sum(), (q, k, u))):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["fourier", "bspline", "rational", "meyer"])
def test_half_precision_is_computed_in_float32(spec: str, dtype: torch.dtype) -> None:
    q, k, u = (x.detach().to(dtype) for x in inputs(spec, per_image=False))
    wanted = basis_attention(q.double(), k.double(), u.double(), spec, impl="reference")
    for impl in ("reference", "tiled"):
        out = basis_attention(q, k, u, spec, impl=impl)
        assert out.dtype == dtype
        assert (out.double() - wanted).norm() <= 1e-2 * wanted.norm()


def test_second_derivatives_in_the_reference_only() -> None:
    q, k, u = inputs("fourier", per_image=False, M=2, N=3)
    for impl in ("reference", "tiled"):
        (dq,) = torch.autograd.grad(basis_attention(q, k, u, "fourier", impl=impl).sum(), q, create_graph=True)
        if impl == "reference":
            (second,) = torch.autograd.grad(dq.square().sum(), k)
            assert second.isfinite().all()
            continue
        with pytest.raises(RuntimeError, match="use impl='reference'"):
            torch.autograd.grad(dq.square().sum(), k)


def test_contraction_of_given_scores() -> None:
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    u = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    wanted = basis_contraction(x, u, "fourier", impl="reference")
    torch.testing.assert_close(basis_contraction(x, u, "fourier", impl="tiled"), wanted)


def test_tiled_keeps_only_its_inputs() -> None:
    kept: list[Tensor] = []
    q, k, u = inputs("fourier", per_image=False, M=50, N=50, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        basis_attention(q, k, u, "fourier", impl="tiled")
    assert {x.data_ptr() for x in kept} <= {x.data_ptr() for x in (q, k, u)}


# opcheck itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("spec", ["fourier", "dog"])
def test_operator_checks_of_torch_library(spec: str) -> None:
    q, k, u = inputs(spec, per_image=False, dtype=torch.float32)
    bias, mask = torch.randn(1, 2, 7, 9, requires_grad=True), torch.rand(1, 1, 7, 9) > 0.3
    torch.library.opcheck(torch.ops.karat.basis_attention.default, (q, k, u, bias, mask, spec, 0.4, "tiled"))


BAD = {
    "q must be": lambda q, k, u: basis_attention(q[0], k, u, "fourier"),
    "u must be": lambda q, k, u: basis_attention(q, k, u[:, :2], "fourier"),
    "unknown impl 'tile'": lambda q, k, u: basis_attention(q, k, u, "fourier", impl="tile"),
    "mask must be boolean": lambda q, k, u: basis_attention(q, k, u, "fourier", mask=torch.zeros(9)),
    "bias must be broadcastable": lambda q, k, u: basis_attention(q, k, u, "fourier", bias=torch.zeros(8)),
    "D at least 1": lambda q, k, u: basis_attention(q[..., :0], k[..., :0], u, "fourier"),
    "scale must be a number": lambda q, k, u: basis_attention(q, k, u, "fourier", scale=torch.ones(2, 1, 1)),
    "without a gradient": lambda q, k, u: basis_attention(q, k, u, "fourier", scale=torch.tensor(1.0).requires_grad_()),
    "of one dtype": lambda q, k, u: basis_attention(q.float(), k, u, "fourier"),
    "impl='triton' can't serve this call": lambda q, k, u: basis_attention(q, k, u, "fourier", impl="triton"),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_says_what_to_do(says: str) -> None:
    with pytest.raises(ValueError) as error:
        BAD[says](*inputs("fourier", per_image=False))
    assert says in str(error.value)
    if "triton" in says:
        assert "tiled" in str(error.value)
