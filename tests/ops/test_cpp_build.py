"""Building the C++ kernel: kept, shared by processes, and never required."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
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

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="building the C++ kernel needs c++ and ninja"
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for extensions; what this process knows of the kernel is forgotten before and after."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(folder / "absent"))


def no_ninja(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", executable(folder / "compiler", "#!/bin/sh\n"))
    monkeypatch.setenv("PATH", str(folder))


def switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARAT_CPP", "0")


def other_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.parametrize(
    ("lack", "says"),
    [
        (no_compiler, "needs a compiler"),
        (no_ninja, "pip install ninja"),
        (switched_off, "KARAT_CPP=0"),
        (other_system, "darwin"),
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


@pytest.mark.skipif(shutil.which("ninja") is None, reason="without ninja nothing is built")
def test_a_failed_build_warns_once_and_is_remembered(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = elsewhere / "calls"
    broken = f"""#!/bin/sh
    case "$1" in *version*) echo 12.2.0; exit 0;; esac
    echo call >> {calls}
    echo 'x.cpp:1: error: this compiler is broken'
    exit 1
    """
    monkeypatch.setenv("CXX", executable(elsewhere / "compiler", broken))
    q, k, u = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 6, 7, 4)
    with pytest.warns(RuntimeWarning, match="this compiler is broken.*the tiled implementation takes its place"):
        out = basis_attention(q, k, u, "fourier(grid=3)")
    assert torch.equal(out, basis_attention(q, k, u, "fourier(grid=3)", impl="tiled"))
    attempts = calls.read_text()
    assert torch.equal(out, basis_attention(q, k, u, "fourier(grid=3)"))
    assert calls.read_text() == attempts


@needs_compiler
@pytest.mark.slow
def test_two_processes_that_build_at_once(elsewhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both end with the kernel, quietly; a lock file that a killed build left behind stops neither."""
    place = build._place()
    place.parent.mkdir()
    place.with_suffix(".lock").touch()
    (place.parent / "lock").touch()
    code = "from karat.ops.cpp import build; assert build.library().problem is None"
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    builders = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [builder.wait(timeout=120) for builder in builders] == [0, 0]
    assert capfd.readouterr() == ("", "")
    assert {file.suffix for file in place.parent.iterdir()} <= {".so", ".lock", ""}
    built = place.stat().st_mtime_ns
    assert build.library().problem is None
    assert place.stat().st_mtime_ns == built


@needs_compiler
def test_another_source_is_another_build(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._place()
    changed = shutil.copytree(build.SOURCES, elsewhere / "csrc")
    with (changed / "gemm.h").open("a") as source:
        source.write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build._place() != before


def test_what_it_cannot_serve_builds_nothing(elsewhere: Path) -> None:
    q, u = torch.randn(1, 1, 2, 4), torch.randn(1, 2, 2, 3)
    cases = {
        "float64": (q.double(), "fourier(grid=1)"),
        "meta": (q.to("meta"), "fourier(grid=1)"),
        "morlet": (q, "morlet"),
        "order <= 5": (q, "bspline(order=6)"),
    }
    for says, (x, spec) in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reason = unsupported(Call(x, x, 1.0), u, parse_basis(spec))
        assert reason is not None
        assert says in reason
    assert not list(elsewhere.iterdir())
