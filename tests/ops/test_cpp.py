"""What is the C++ kernel's own: its sine and cosine, its tiles. What it shares with the tiled path: test_cpu.py."""

from __future__ import annotations

import shutil
from importlib import resources

import pytest
import torch

from karat.basis import BASES
from karat.ops.cpp import task
from karat.ops.cpp.build import library
from support.against_float64 import assert_matches, make, parameters_of

# Without a compiler the kernel can't be tested; with one, a build that fails is a failure.
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="building the C++ kernel needs c++")


def test_the_kernel_is_there() -> None:
    assert library().problem is None


def test_a_familys_number_is_the_kernels() -> None:
    text = (resources.files("karat.ops.cpp") / "csrc" / "features.h").read_text()
    names = text.split("enum Family : int64_t { ")[1].split(", FAMILIES };")[0].split(", ")
    numbers = {name: task.basis_of(basis())[0] for name, basis in BASES.items() if task.basis_of(basis())}
    assert {name: names[number] for name, number in numbers.items()} == {name: name.upper() for name in numbers}


@pytest.mark.parametrize(("largest", "tolerance"), [(4.0, 3e-7), (1e3, 2e-6), (1.6e4, 2e-6), (1e8, 1e-6), (1e38, 1e-6)])
def test_sine_and_cosine(largest: float, tolerance: float) -> None:
    n = 1 << 14
    x = torch.cat([torch.linspace(-largest, largest, n), (torch.rand(n) * 2 - 1) * largest, torch.zeros(16)])
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    library().run("karat_sincos", x.data_ptr(), sine.data_ptr(), cosine.data_ptr(), len(x))
    assert (sine - x.double().sin()).abs().max() <= tolerance
    assert (cosine - x.double().cos()).abs().max() <= tolerance
    assert sine.abs().max() <= 1 + 1e-6


def test_sine_of_what_is_not_finite_is_nan() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0] * 4)
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    library().run("karat_sincos", x.data_ptr(), sine.data_ptr(), cosine.data_ptr(), len(x))
    finite = x.isfinite()
    for values in (sine, cosine):
        assert torch.equal(values.isfinite(), finite)


@pytest.mark.parametrize("tile", [(1 << 12, 64), (1 << 10, 128)])
def test_many_tiles(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries cut into tiles, the last ones short."""
    monkeypatch.setattr(task, "TILE_BYTES", tile[0])
    monkeypatch.setattr(task, "TILE_KEYS", tile[1])
    q, k, u = make(1, 2, 131, 300, 24, 6, 12)
    mask = torch.rand(1, 1, 131, 300) > 0.5
    assert_matches(q, k, u, "fourier(grid=3)", "cpp", bias=torch.randn(1, 1, 131, 300), mask=mask)


# opcheck itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("spec", ["fourier(grid=1)", "silu+bspline(grid=2,order=2)"])
def test_operator_checks_of_torch_library(spec: str) -> None:
    q, k, u = (x.requires_grad_() for x in make(1, 2, 5, 6, 4, parameters_of(spec), 3))
    bias = torch.randn(1, 2, 5, 6, requires_grad=True)
    mask = torch.rand(1, 1, 5, 6) > 0.3
    torch.library.opcheck(torch.ops.karat.basis_attention.default, (q, k, u, bias, mask, spec, 0.4, "cpp"))
