"""Finding the C++ kernel: the library that a wheel carries for this CPU, or one built on first use, once per machine.

A library that was built is kept in a folder whose name is a hash of all that it depends on: source, flags, CPU,
PyTorch. So is a failure, in words, for each compiler. Where that folder can't be written, one of the system's temporary
folder takes its place.

Environment: KARAT_CPP=0 switches the kernel off; TORCH_EXTENSIONS_DIR moves the folder (default
~/.cache/torch_extensions); CXX names the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from karat.ops.cpp.compiler import FLAGS, OPENMP, SOURCE, compile_library

SOURCES = SOURCE.parent
WHEEL = Path(__file__).parent / "libraries"  # there in a wheel for Linux alone
# What PyTorch says of a CPU -> the libraries that run on it, best first. NEON is part of every 64-bit ARM.
KINDS = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
NATIVE = "-march=native"
PROBE = "int karat_forward(int n) {\n#pragma omp parallel for\n  for (int i = 0; i < n; ++i);\n  return n;\n}\n"
# Another process that builds is waited for; one that hangs isn't waited for longer than this.
LONGEST_WAIT_SECONDS = 120


class Library:
    """The loaded kernel and where it is from, or the problem that prevents it."""

    def __init__(self, functions: ctypes.CDLL | None, problem: str | None = None, origin: str = "") -> None:
        self._functions, self.problem, self.origin = functions, problem, origin

    def run(self, function: str, *arguments: bytes | int) -> None:
        """Call a function of the kernel; bytes are what a pointer points to, numbers are pointers."""
        assert self._functions is not None
        getattr(self._functions, function)(*[x if isinstance(x, bytes) else ctypes.c_void_p(x) for x in arguments])


@lru_cache(maxsize=1)
def library() -> Library:
    """The kernel, built if need be. A problem is found once in a process; a failed build warns, once."""
    if os.environ.get("KARAT_CPP", "1") == "0":
        return Library(None, "the C++ kernel is switched off by KARAT_CPP=0")
    if sys.platform not in ("linux", "darwin"):
        return Library(None, f"the C++ kernel is for Linux and macOS, this is {sys.platform}")
    try:
        return _of_the_wheel() or _built_here()
    except Exception as error:  # a compiler fails in many ways; none of them may stop a model that runs without it
        problem = f"the C++ kernel could not be built ({_gist(error)})"
        warnings.warn(f"{problem}; the tiled implementation takes its place", RuntimeWarning, stacklevel=2)
        return Library(None, problem)


def _of_the_wheel() -> Library | None:
    for kind in KINDS.get(torch.backends.cpu.get_cpu_capability(), ("neon",)):
        functions = _load(WHEEL / f"{kind}.so")
        if functions is not None:
            return Library(functions, origin=f"for {kind.upper()}, of the wheel")
    return None


def _built_here() -> Library:
    """The library kept on this machine, else a new one; raises RuntimeError with what a failed build said."""
    name, compiler = _name(), shlex.split(os.environ.get("CXX", "")) or ["c++"]
    remembered = f"{_hash(' '.join(compiler), _version(compiler[0]))}.failed"
    for folder in (root / name for root in _roots()):
        if (kept := _kept(folder, remembered)) is not None:
            return kept
        if _writable(folder):
            break
    else:
        return Library(None, "the C++ kernel has no folder to be built in: name one in TORCH_EXTENSIONS_DIR")
    if shutil.which(compiler[0]) is None:
        return Library(None, f"the C++ kernel needs a compiler: no {compiler[0]} here; install g++, or name one in CXX")
    with _alone(folder):
        return _kept(folder, remembered) or _build(compiler, folder, folder / remembered)


def _writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False


def _kept(folder: Path, remembered: str) -> Library | None:
    """The library in a folder; raises what an earlier build with this compiler failed with."""
    functions = _load(folder / f"{folder.name}.so")
    if functions is not None:
        return Library(functions, origin="built on this machine")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        words = (folder / remembered).read_text(encoding="utf-8")
        raise RuntimeError(f"{words}; delete {folder / remembered} to have it tried again")
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    """A library with the kernel's functions, or None where there is none that can be loaded."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path)) if path.exists() else None
    return None


def _build(compiler: list[str], folder: Path, remembered: Path) -> Library:
    path = folder / f"{folder.name}.so"
    try:
        compile_library(compiler, path, *_understood(compiler, folder), source=SOURCES / SOURCE.name)
        return Library(ctypes.CDLL(str(path)), origin="built on this machine")
    except (subprocess.CalledProcessError, OSError) as error:  # OSError: built, but it can't be loaded
        words = _gist(error)
        remembered.write_text(words, encoding="utf-8")
        raise RuntimeError(words) from error


def _understood(compiler: list[str], folder: Path) -> Iterator[str]:
    """Flags that give a library which can be loaded: some compilers lack one of them, some OpenMP's runtime."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "probe.cpp"
        source.write_text(f'extern "C" {PROBE}')
        for flag in (NATIVE, OPENMP):
            probe = source.with_name(f"probe{flag}.so")
            with contextlib.suppress(subprocess.CalledProcessError, OSError):
                compile_library(compiler, probe, flag, source=source)
                ctypes.CDLL(str(probe))
                yield flag


def _gist(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong."""
    text = (
        f"{error.stderr}\n{error.stdout}\n{error}" if isinstance(error, subprocess.CalledProcessError) else str(error)
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line.lower()), lines[0])


def _name() -> str:
    """Names the library of this source, CPU and PyTorch."""
    sources = "".join(_hash(source.read_bytes()) for source in sorted(SOURCES.iterdir()))
    return f"karat_cpp_{_hash(sources, *FLAGS, NATIVE, OPENMP, torch.__version__, _cpu())}"


def _roots() -> Iterator[Path]:
    """Where libraries are kept, best first: HOME may be unset, read-only or nowhere."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    with contextlib.suppress(RuntimeError):
        yield Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    shared = Path(tempfile.gettempdir()) / f"karat-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        shared.mkdir(mode=0o700)
    found = shared.lstat()  # others may write to its parent: nobody else's library is loaded
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        yield shared


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:16]


def _version(compiler: str) -> str:
    """Tells one state of a compiler from the next: an upgraded one is tried again."""
    path = shutil.which(compiler)
    return "" if path is None else f"{os.path.realpath(path)} {os.stat(path).st_mtime_ns}"


def _cpu() -> str:
    """Names what -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name", "CPU part")}
    return "\n".join(sorted(kept))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process builds at a time; the lock is the system's, and dies with its holder."""
    lock = FileLock(folder / f"{folder.name}.lock")
    with contextlib.suppress(Timeout):  # two builders do no harm: each has its own folder, the last step is atomic
        lock.acquire(timeout=LONGEST_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()
