"""Building and loading the C++ kernel: on first use, through PyTorch's extension loader, once per machine.

The shared library is kept in a folder whose name is a hash of all that it depends on: source, flags, CPU, PyTorch.
It uses no header of PyTorch's and no OpenMP runtime of its own: OpenMP's functions are left undefined and resolve to
the runtime that PyTorch has loaded, so that there is one pool of threads.

Environment: KARAT_CPP=0 switches the kernel off; TORCH_EXTENSIONS_DIR moves the folder (default
~/.cache/torch_extensions); CXX names the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
NATIVE = "-march=native"
# Another process that builds is waited for; one that hangs isn't waited for longer than this.
LONGEST_WAIT_SECONDS = 120


class Library:
    """The loaded kernel, or the problem that prevents it."""

    def __init__(self, functions: ctypes.CDLL | None, problem: str | None = None) -> None:
        self._functions, self.problem = functions, problem

    def run(self, function: str, *arguments: ctypes.Structure | int) -> None:
        """Call a function of the kernel; structures go by reference."""
        assert self._functions is not None
        getattr(self._functions, function)(
            *(ctypes.byref(x) if isinstance(x, ctypes.Structure) else ctypes.c_void_p(x) for x in arguments)
        )


@lru_cache(maxsize=1)
def library() -> Library:
    """The kernel, built if need be. A problem is found once in a process; a failed build warns, once."""
    if os.environ.get("KARAT_CPP", "1") == "0":
        return Library(None, "the C++ kernel is switched off by KARAT_CPP=0")
    if sys.platform != "linux":
        return Library(None, f"the C++ kernel is built on Linux, this is {sys.platform}")
    try:
        path = _place()
        if not path.exists():
            if shutil.which(os.environ.get("CXX", "c++")) is None:
                return Library(None, "the C++ kernel needs a compiler: install g++, or name one in CXX")
            if shutil.which("ninja") is None:
                return Library(None, "the C++ kernel needs ninja to be built: pip install ninja")
            _build_once(path)
        return Library(ctypes.CDLL(str(path)))
    except Exception as error:  # a compiler fails in many ways; none of them may stop a model that runs without it
        problem = f"the C++ kernel could not be built ({_gist(error)})"
        warnings.warn(f"{problem}; the tiled implementation takes its place", RuntimeWarning, stacklevel=2)
        return Library(None, problem)


def _gist(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line.lower()), lines[0])


def _place() -> Path:
    """Where the library of this source, CPU and PyTorch belongs."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    for part in (*FLAGS, NATIVE, torch.__version__, _cpu()):
        digest.update(part.encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    name = f"karat_cpp_{digest.hexdigest()[:16]}"
    return Path(root) / name / f"{name}.so"


def _cpu() -> str:
    """Names what -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name", "CPU part")}
    return "\n".join(sorted(kept))


def _build_once(path: Path) -> None:
    """Build the library at `path`, one process at a time; the lock is the system's, and dies with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    with contextlib.suppress(Timeout):  # two builders do no harm: each has its own folder, the last step is atomic
        lock.acquire(timeout=LONGEST_WAIT_SECONDS)
    try:
        if not path.exists():
            _build(path)
    finally:
        lock.release()


def _build(path: Path) -> None:
    quiet = logging.getLogger("torch.utils.cpp_extension")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it remarks on CUDA, which has no part in this
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            warnings.simplefilter("ignore")
            from torch.utils import cpp_extension

            def build(*flags: str) -> None:
                cpp_extension.load(
                    path.stem,
                    [str(SOURCES / "basis_attention.cpp")],
                    extra_cflags=[*FLAGS, *flags],
                    build_directory=folder,
                    is_python_module=False,
                    with_cuda=False,
                )

            try:
                build(NATIVE)
            except RuntimeError:  # some compilers don't know the flag on some machines
                build()
            built = max(Path(folder).glob("*.so"), key=lambda file: file.stat().st_mtime_ns)
            os.replace(built, path)
    finally:
        quiet.setLevel(level)
