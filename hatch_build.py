"""The build hook of karat's wheels: with KARAT_WHEEL=x86_64 or aarch64 the wheel carries the compiled C++ kernel.

Without the variable, as in `pip install .`, the wheel is pure and the kernel is built on first use. CXX names the
compiler; by default it's the machine's own, for another machine g++ as Debian names its cross compilers.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What the policy manylinux_2_28 promises of a system's libraries.
NEWEST = {b"GLIBC_2": 28, b"GLIBCXX_3.4": 24, b"CXXABI_1.3": 11}


class CarryTheKernel(BuildHookInterface):
    """Compiles the libraries of one machine, checks that any Linux of 2018 or later can load them, tags the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to the wheel, where one is asked for."""
        machine = os.environ.get("KARAT_WHEEL")
        if not machine or version == "editable":
            return
        kernel = runpy.run_path(str(Path(self.root, "src", "karat", "ops", "cpp", "compiler.py")))
        if machine not in kernel["WHEELS"]:
            raise ValueError(f"KARAT_WHEEL must be one of {', '.join(kernel['WHEELS'])}, got {machine!r}")
        usual = "c++" if platform.machine() == machine else f"{machine}-linux-gnu-g++"
        folder = Path(self.root, "build", "libraries", machine)
        folder.mkdir(parents=True, exist_ok=True)
        for name, flags in kernel["WHEELS"][machine].items():
            library = folder / f"{name}.so"
            kernel["compile_library"](shlex.split(os.environ.get("CXX") or usual), library, *flags, kernel["OPENMP"])
            check(library)
            build_data["force_include"][str(library)] = f"karat/ops/cpp/libraries/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_28_{machine}"


def check(library: Path) -> None:
    """Raise RuntimeError for a library that asks for newer system libraries than the wheel's tag promises."""
    content = library.read_bytes()
    for name, newest in NEWEST.items():
        asked = [int(minor) for minor in re.findall(rb"\b" + re.escape(name) + rb"\.(\d+)", content)]
        if max(asked, default=0) > newest:
            raise RuntimeError(f"{library} asks for {name.decode()}.{max(asked)}, the wheel promises {newest} at most")
