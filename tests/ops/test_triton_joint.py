"""Joint attention in the Triton kernels against the two attentions apart; tiles and devices as in test_triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.joint_apart import check, make, some_mask, together

pytest.importorskip("karat.ops.triton.arguments", reason="Triton is not installed", exc_type=ImportError)

from karat.ops import joint_attention
from support.triton import DEVICE, TOLERANCE, arguments, launch, pytestmark, small_tiles

__all__ = ["pytestmark", "small_tiles"]  # pytest takes them from here

LINEAR = ["fourier(grid=1)", "fourier(grid=3)", "bspline(grid=2,order=2)", "silu+fourier(grid=2)"]
SIZES = (2, 2, 18, 20, 8, 5, 9)


def on_device(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.to(DEVICE) for x in leaves]


@pytest.mark.parametrize("masked", [None, "pairs", "keys"])
@pytest.mark.parametrize("spec", LINEAR)
def test_equals_the_two_apart(spec: str, masked: str | None) -> None:
    bias = None if masked == "keys" else (1, 2, 18, 20)
    leaves = on_device(make(spec, SIZES, per_image=masked == "pairs", bias=bias, dtype=torch.float32))
    mask = some_mask(masked, 2, 18, 20)
    mask = None if mask is None else mask.to(DEVICE)
    check(leaves, spec, "triton", mask, tolerance=TOLERANCE[torch.float32])


def test_edges_that_are_not_linear() -> None:
    leaves = on_device(make("dog", (1, 1, 9, 18, 8, 3, 4), bias=(1, 1, 9, 18), dtype=torch.float32))
    check(leaves, "dog", "triton", tolerance=TOLERANCE[torch.float32])


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    most = (2, 2, 35, 35, 20, 18, 20)
    sizes = B, H, M, N, _, _, _ = tuple(data.draw(st.integers(1, size)) for size in most)
    axes = st.tuples(*(st.sampled_from((1, axis)) for axis in (B, H, M, N)))
    bias, mask = data.draw(st.none() | axes), data.draw(st.none() | axes)
    spec, dtype = data.draw(st.sampled_from(LINEAR)), data.draw(st.sampled_from([torch.float32, torch.float16]))
    leaves = on_device(make(spec, sizes, per_image=data.draw(st.booleans()), bias=bias, dtype=dtype))
    keep = None if mask is None else torch.rand(*mask, device=DEVICE) > 0.4
    check(leaves, spec, "triton", keep, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("most", [0, launch.MOST_SUMS])
def test_softmax_goes_with_the_first_of_several_launches(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in slices, and dU in groups: the softmax's share is added once, dV with the first or after all."""
    monkeypatch.setattr(launch, "DU_NUMBERS", 16 * 16 * 3)
    monkeypatch.setattr(launch, "MOST_SUMS", most)
    for kind in arguments.WIDEST:
        monkeypatch.setitem(arguments.WIDEST, kind, 4)
    leaves = on_device(make("gelu+fourier(grid=3)", (1, 1, 5, 9, 4, 9, 6), bias=(1, 1, 5, 9), dtype=torch.float32))
    check(leaves, "gelu+fourier(grid=3)", "triton", tolerance=1e-5)


def test_only_wanted_gradients() -> None:
    leaves = on_device(make("fourier(grid=1)", (1, 1, 5, 7, 4, 3, 4), dtype=torch.float32))
    wanted = together(leaves, "fourier(grid=1)", None, "triton")
    for alone in range(4):
        inputs = [x.detach().requires_grad_(i == alone) for i, x in enumerate(leaves)]
        out = joint_attention(*inputs, "fourier(grid=1)", impl="triton")
        weights = [torch.linspace(-2, 2, x.numel()).double().cos().view(x.shape).to(x) for x in out]
        (got,) = torch.autograd.grad(out, inputs[alone], weights)
        torch.testing.assert_close(got, wanted[2 + alone])


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 5, 2, 3), (1, 2, 0, 4, 5, 2, 3), (1, 2, 3, 0, 5, 2, 3)])
def test_empty_inputs(sizes: tuple[int, ...]) -> None:
    leaves = on_device(make("fourier(grid=1)", sizes, dtype=torch.float32))
    assert not any(x.any() for x in together(leaves, "fourier(grid=1)", None, "triton"))
