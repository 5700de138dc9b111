"""What the tests of the Triton kernels share: where they run, and tiles small enough for the interpreter."""

from __future__ import annotations

import pytest
import torch

from karat.basis import parse_basis
from karat.ops.call import Call
from karat.ops.triton.attention import unsupported

launch = pytest.importorskip("karat.ops.triton.launch", reason="Triton is not installed", exc_type=ImportError)
arguments = pytest.importorskip("karat.ops.triton.arguments", reason="Triton is not installed", exc_type=ImportError)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ONE = torch.empty(1, 1, 1, 1, device=DEVICE)
pytestmark = pytest.mark.skipif(
    unsupported(Call(ONE, ONE, 1.0), torch.empty(1), parse_basis("dog")) is not None,
    reason="neither a GPU that the kernels serve nor Triton's interpreter",
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, and sums that are cut into several programs and launches."""
    if DEVICE == "cpu":
        for kind, kernels in arguments.TILES.items():
            small = {name: arguments.Tiles(16, 16, 4, 1) for name in kernels}
            monkeypatch.setitem(arguments.TILES, kind, small)
    monkeypatch.setattr(launch, "PROGRAMS_PER_MULTIPROCESSOR", 16)
