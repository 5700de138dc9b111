"""Wheels: they carry the kernel compiled for their machine, and promise no more than it keeps."""

from __future__ import annotations

import ctypes
import platform
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from karat.ops.cpp import build
from karat.ops.cpp.compiler import OPENMP, SOURCE, WHEELS, compile_library
from support.paths import ROOT

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def test_every_library_of_a_wheel_is_one_that_is_looked_for() -> None:
    looked_for = {kind for kinds in build.KINDS.values() for kind in kinds} | {"neon"}
    assert {kind for kinds in WHEELS.values() for kind in kinds} == looked_for


def test_the_project_names_the_hook_and_needs_no_build_tool() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "custom" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]
    assert (ROOT / "hatch_build.py").is_file()
    assert project["project"]["optional-dependencies"]["cpp"] == []


@pytest.mark.parametrize(
    ("symbol", "promised"), [("GLIBC_2.28", True), ("GLIBC_2.34", False), ("GLIBCXX_3.4.29", False)]
)
def test_a_library_that_asks_for_newer_system_libraries_is_refused(symbol: str, promised: bool, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build hook needs hatchling")
    check = runpy.run_path(str(ROOT / "hatch_build.py"))["check"]
    (library := tmp_path / "x.so").write_bytes(b"\0GLIBC_2.17\0" + symbol.encode() + b"\0")
    if promised:
        return check(library)
    with pytest.raises(RuntimeError, match=r"asks for .*, the wheel promises"):
        check(library)


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs c++")
def test_compiling_for_a_wheel_asks_for_nothing_of_pytorch(tmp_path: Path) -> None:
    (tmp_path / "x.cpp").write_text('extern "C" int one() { return 1; }')
    flags = next(iter(WHEELS.get(platform.machine(), {"": ()}).values()))
    compile_library(["c++"], tmp_path / "x.so", *flags, OPENMP, source=tmp_path / "x.cpp")
    assert ctypes.CDLL(str(tmp_path / "x.so")).one() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"x.cpp", "x.so"}


# The kernel's sums in plain loops, beside the kernel's: 2 images, 3 heads, 17 queries, 35 keys, N=35, D=20, G=3, E=12.
CHECK = """
#include "basis_attention.cpp"
#include <cstdio>
int main() {
  const int64_t B = 2, H = 3, M = 17, N = 35, D = 20, G = 3, F = 2 * G, E = 12;
  std::vector<float> q(B * H * M * D), k(B * H * N * D), u(H * F * N * E), sums(B * H * M * E);
  unsigned seed = 1;
  for (auto* x : {&q, &k, &u})
    for (float& one : *x) one = ((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
  Call c = {};
  c.B = B, c.H = H, c.M = M, c.N = N, c.D = D, c.F = F, c.E = E;
  c.threads = 3, c.parts = 1, c.tile_queries = 6, c.tile_keys = 16, c.shared_u = 1;
  c.basis = {FOURIER, NONE, G, 0, 0.0f}, c.scale = 0.5f;
  c.q = q.data(), c.k = k.data(), c.u = u.data(), c.sums = sums.data();
  const int64_t qs[] = {H * M * D, M * D, D, 1}, ks[] = {H * N * D, N * D, D, 1}, us[] = {0, F * N * E, N * E, E, 1};
  const int64_t ss[] = {H * M * E, M * E, E, 1};
  std::copy(qs, qs + 4, c.q_strides), std::copy(ks, ks + 4, c.k_strides), std::copy(us, us + 5, c.u_strides);
  std::copy(ss, ss + 4, c.sums_strides);
  karat_forward(&c);
  double worst = 0;
  for (int64_t at = 0; at < B * H * M * E; ++at) {
    const int64_t e = at % E, i = at / E % M, bh = at / E / M;
    double sum = 0;
    for (int64_t j = 0; j < N; ++j) {
      double s = 0;
      for (int64_t d = 0; d < D; ++d) s += 0.5 * q[(bh * M + i) * D + d] * k[(bh * N + j) * D + d];
      for (int64_t f = 0; f < F; ++f)
        sum += (f < G ? std::cos((f + 1) * s) : std::sin((f - G + 1) * s)) * u[((bh % H * F + f) * N + j) * E + e];
    }
    worst = std::max(worst, std::abs(sum - sums[at]));
  }
  std::printf("%g", worst);
  return worst < 1e-4 ? 0 : 1;
}
"""


@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None, reason=f"needs {CROSS} and {EMULATOR} to run on ARM"
)
@pytest.mark.slow
def test_the_kernel_on_arm_equals_plain_loops(tmp_path: Path) -> None:
    (tmp_path / "check.cpp").write_text(CHECK)
    command = [CROSS, "-std=c++17", "-O1", "-fopenmp", "-static", f"-iquote{SOURCE.parent}", "check.cpp", "-o", "check"]
    subprocess.run([*command, "-Wno-psabi"], cwd=tmp_path, check=True)
    ran = subprocess.run([EMULATOR, "./check"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, f"largest difference {ran.stdout} {ran.stderr}"
