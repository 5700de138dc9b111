"""The kernels' own sine, activations and splines, elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from karat.basis import parse_basis
from karat.basis.activations import ACTIVATIONS

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from karat.ops.call import Call  # noqa: E402
from karat.ops.triton import launch  # noqa: E402
from karat.ops.triton.arguments import Tiles  # noqa: E402
from karat.ops.triton.attention import LARGEST_ORDER, unsupported  # noqa: E402
from karat.ops.triton.features import spline  # noqa: E402
from karat.ops.triton.functions import activation, activation_slope, sincos  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE = torch.empty(1, 1, 1, 1, device=DEVICE)
pytestmark = pytest.mark.skipif(
    unsupported(Call(ONE, ONE, 1.0), torch.empty(1), parse_basis("dog")) is not None,
    reason="neither a GPU that the kernels serve nor Triton's interpreter",
)


@triton.jit
def sincos_kernel(x, cos, sin, SINE: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_cos, b_sin = sincos(tl.load(x + o), SINE)
    tl.store(cos + o, b_cos)
    tl.store(sin + o, b_sin)


@triton.jit
def activation_kernel(x, value, slope, BASE: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_x = tl.load(x + o)
    tl.store(value + o, activation(b_x, BASE))
    tl.store(slope + o, activation_slope(b_x, BASE))


@triton.jit
def spline_kernel(x, value, slope, ORDER: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_value, b_slope = spline(tl.load(x + o), ORDER)
    tl.store(value + o, b_value)
    tl.store(slope + o, b_slope)


def pair(kernel: Any, x: Tensor, setting: object) -> tuple[Tensor, Tensor]:
    first, second = torch.empty_like(x), torch.empty_like(x)
    kernel[(len(x) // 1024,)](x, first, second, setting, 1024)
    return first.double(), second.double()


SINES = {"exact": (1e-6, 0.0), "polynomial": (3e-5, 1.2e-7), "unit": (2e-6, 1.2e-7)}


@pytest.mark.parametrize("sine", SINES)
@pytest.mark.parametrize("largest", [3.2, 100.0, 1e3])
def test_error_of_sine_and_cosine(sine: str, largest: float) -> None:
    x = torch.empty(64 * 1024, device=DEVICE).uniform_(-largest, largest)
    x[:2001] = torch.pi / 2 * torch.arange(-1000, 1001, device=DEVICE) * min(1.0, largest / 1600)
    cos, sin = pair(sincos_kernel, x, sine)
    bound, growth = SINES[sine]
    allowed = bound + growth * x.double().abs()
    assert ((cos - x.double().cos()).abs() <= allowed).all()
    assert ((sin - x.double().sin()).abs() <= allowed).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy notes inf - inf
@pytest.mark.parametrize("sine", SINES)
def test_sine_of_anything_stays_bounded_and_of_nan_is_nan(sine: str) -> None:
    x = torch.logspace(3, 30 if sine == "exact" else 7, 1024, device=DEVICE)
    for wave in pair(sincos_kernel, x, sine):
        assert wave.abs().max() <= 1 + 1e-4
    for odd in (torch.nan, torch.inf):
        for wave in pair(sincos_kernel, torch.full((1024,), odd, device=DEVICE), sine):
            assert wave.isnan().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes(name: str) -> None:
    x = torch.linspace(-9, 9, 4096, device=DEVICE)
    value, slope = pair(activation_kernel, x, name)
    torch.testing.assert_close(value, ACTIVATIONS[name].value(x.double()), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope, ACTIVATIONS[name].slope(x.double()), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("order", range(1, LARGEST_ORDER + 1))
def test_spline_of_whole_knots(order: int) -> None:
    from scipy.interpolate import BSpline

    x = torch.linspace(-1.003, order + 2.001, 2048, device=DEVICE)
    exact = BSpline.basis_element(range(order + 2), extrapolate=False)
    points = x.double().cpu().numpy()
    value, slope = pair(spline_kernel, x, order)
    for got, function in ((value, exact), (slope, exact.derivative())):
        wanted = torch.from_numpy(function(points)).nan_to_num(0)
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=5e-6)


class Fitting:
    """A kernel whose buffers fit at a depth of one; it counts what is tried."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._run

    def _run(self, num_stages: int, **arguments: object) -> None:
        self.tried.append(num_stages)
        if num_stages > 1:
            raise triton.OutOfResources(2, 1, "shared memory")


def test_a_launch_that_failed_is_not_tried_again() -> None:
    kernel, tiles = Fitting(), Tiles(64, 64, 4, 3)
    for N, width in ((197, 12), (65, 12), (197, 24)):  # the last one is another variant
        launch._launch(kernel, 1, tiles, q=ONE, N=N, E=width)
    assert kernel.tried == [3, 2, 1, 1, 3, 2, 1]
