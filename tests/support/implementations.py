"""The implementations that serve calls on a CPU, for tests over all of them."""

from __future__ import annotations

import shutil

import pytest

from karat.ops.implementations import PREFERENCE

# Without a compiler the C++ kernel can't be tested; with one, a build that fails is a failure.
COMPILER = shutil.which("c++") is not None
needs_compiler = pytest.mark.skipif(not COMPILER, reason="building the kernel needs c++")
ON_CPU = [pytest.param(name, marks=needs_compiler) if name == "cpp" else name for name in (*PREFERENCE["cpu"], "tiled")]
