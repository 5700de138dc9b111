"""Building the C++ kernel: kept, shared by processes, and never required."""

from __future__ import annotations

import ctypes
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from karat.basis import parse_basis
from karat.ops import basis_attention
from karat.ops.call import Call
from karat.ops.cpp import build
from karat.ops.cpp.attention import unsupported
from karat.ops.cpp.compiler import OPENMP, compile_library
from support.implementations import needs_compiler
from support.processes import Started


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for extensions; what this process knows of the kernel is forgotten before and after."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "WHEEL", tmp_path)
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(folder / "absent"))


def switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARAT_CPP", "0")


def other_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.parametrize(
    ("lack", "says"),
    [
        (no_compiler, "needs a compiler"),
        (switched_off, "KARAT_CPP=0"),
        (other_system, "win32"),
    ],
)
def test_without_it_the_tiled_path_serves(
    lack: Callable[[Path, pytest.MonkeyPatch], None], says: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(elsewhere, monkeypatch)
    q, k, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    tiled = basis_attention(q, k, u, "fourier(grid=3)", impl="tiled")
    assert torch.equal(basis_attention(q, k, u, "fourier(grid=3)", impl="auto"), tiled)
    with pytest.raises(ValueError, match=f"impl='cpp' can't serve this call: .*{says}.*; use .*tiled"):
        basis_attention(q, k, u, "fourier(grid=3)", impl="cpp")


# Stand-ins for compilers: what they do with the file after -o.
FAILS = "echo 'x.cpp:1: error: this compiler is broken'; exit 1"
NOT_LOADED = 'for x; do [ "$before" = -o ] && echo junk > "$x"; before=$x; done'


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Names a stand-in as the compiler; the file that it leaves a line in at each call."""
    (folder / "bin").mkdir(exist_ok=True)
    monkeypatch.setenv("CXX", executable(folder / "bin" / "compiler", f"#!/bin/sh\necho >> {folder}/calls\n{does}\n"))
    return folder / "calls"


@pytest.mark.parametrize(
    ("does", "says"),
    [(FAILS, "this compiler is broken"), (NOT_LOADED, "file too short|invalid ELF|not a mach-o")],
)
def test_a_failed_build_is_remembered_by_the_next_process(
    does: str, says: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(elsewhere, monkeypatch, does)
    q, k, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    with pytest.warns(RuntimeWarning, match=f"({says}).*the tiled implementation takes its place") as warned:
        out = basis_attention(q, k, u, "fourier(grid=3)")
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert torch.equal(out, basis_attention(q, k, u, "fourier(grid=3)", impl="tiled"))
    attempts = calls.read_text()
    assert torch.equal(out, basis_attention(q, k, u, "fourier(grid=3)"))  # no second warning in a process
    build.library.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"({says}).*delete .*failed to have it tried again"):
        assert torch.equal(out, basis_attention(q, k, u, "fourier(grid=3)"))
    assert calls.read_text() == attempts
    build.library.cache_clear()
    compiler(elsewhere, monkeypatch, f"{does} # upgraded")
    with pytest.warns(RuntimeWarning, match=says):
        assert build.library().problem
    assert calls.read_text() != attempts


def small_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a source built that takes no time."""
    (folder / build.SOURCE.name).write_text('extern "C" void karat_forward() {}')
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.delenv("CXX", raising=False)


def no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(Path, "home", home)


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "file"))  # root may write anywhere else


@needs_compiler
@pytest.mark.parametrize("lack", [no_home, read_only])
def test_without_a_folder_of_its_own_a_temporary_one_serves(
    lack: Callable[[Path, pytest.MonkeyPatch], None],
    elsewhere: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_kernel(tmp_path_factory.mktemp("csrc"), monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    lack(elsewhere, monkeypatch)
    assert build.library().problem is None
    (kept,) = elsewhere.glob("karat-*/*/*.so")
    built = kept.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library().origin == "built on this machine"
    assert kept.stat().st_mtime_ns == built
    kept.parent.parent.chmod(0o777)  # anybody may have put it there now
    build.library.cache_clear()
    assert "no folder to be built in" in str(build.library().problem)


@needs_compiler
def test_the_library_of_a_wheel_is_taken_by_what_the_cpu_can(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_kernel(elsewhere, monkeypatch)
    for kind in ("avx2", "avx512", "neon"):
        compile_library(["c++"], elsewhere / f"{kind}.so", source=elsewhere / build.SOURCE.name)
    monkeypatch.setenv("CXX", "absent")
    for capability, kind in (("AVX512", "AVX512"), ("AVX2", "AVX2"), ("SVE256", "NEON")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        build.library.cache_clear()
        assert build.library().origin == f"for {kind}, of the wheel"
    (elsewhere / "neon.so").unlink()
    build.library.cache_clear()
    assert "needs a compiler" in str(build.library().problem)


THREADS = """
#include "threads.h"
extern "C" long karat_forward(long threads) {
  std::vector<long> done(threads);
  karat::in_threads(threads, [&](int64_t t) { done[t] = t + 1; });
  long sum = 0;
  for (long x : done) sum += x;
  return sum;
}
"""


@needs_compiler
@pytest.mark.parametrize("flags", [(), (OPENMP,)], ids=["its own", "OpenMP's"])
def test_threads(flags: tuple[str, ...], elsewhere: Path) -> None:
    (elsewhere / "threads.cpp").write_text(THREADS)
    compile_library(["c++"], elsewhere / "x.so", *flags, f"-iquote{build.SOURCES}", source=elsewhere / "threads.cpp")
    functions = ctypes.CDLL(str(elsewhere / "x.so"))
    assert [functions.karat_forward(threads) for threads in (1, 2, 5)] == [1, 3, 15]


# Nothing is computed, so the compiler needn't make it fast.
BUILDER = """
import sys, warnings
from pathlib import Path
from karat.ops.cpp import build, compiler
warnings.simplefilter("error")
compiler.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in compiler.FLAGS)
build.WHEEL = Path(sys.argv[1])
assert build.library().problem is None
"""


@needs_compiler
@pytest.mark.slow
def test_two_processes_that_build_at_once(elsewhere: Path) -> None:
    """Both end with the kernel, quietly; a lock file that a killed build left behind stops neither."""
    place = elsewhere / build._name() / f"{build._name()}.so"
    place.parent.mkdir()
    place.with_suffix(".lock").touch()
    ends = [builder.said() for builder in [Started(BUILDER, str(elsewhere)) for _ in range(2)]]
    assert [(end.returncode, end.stdout, end.stderr) for end in ends] == [(0, "", "")] * 2
    assert {file.suffix for file in place.parent.iterdir()} <= {".so", ".lock"}
    built = place.stat().st_mtime_ns
    assert Started(BUILDER, str(elsewhere)).said().returncode == 0
    assert place.stat().st_mtime_ns == built


@needs_compiler
def test_another_source_is_another_build(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._name()
    changed = shutil.copytree(build.SOURCES, elsewhere / "csrc")
    with (changed / "gemm.h").open("a") as source:
        source.write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build._name() != before


def test_what_it_cannot_serve_builds_nothing(elsewhere: Path) -> None:
    q, u = torch.randn(1, 1, 2, 4), torch.randn(1, 2, 2, 3)
    cases = {
        "float64": (q.double(), "fourier(grid=1)"),
        "meta": (q.to("meta"), "fourier(grid=1)"),
        "omega 1000": (q, "morlet(omega=2000)"),
        "degree 8": (q, "rational(m=9)"),
        "order 5": (q, "bspline(order=6)"),
    }
    for says, (x, spec) in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reason = unsupported(Call(x, x, 1.0), u, parse_basis(spec))
        assert reason is not None
        assert says in reason
    assert not list(elsewhere.iterdir())
