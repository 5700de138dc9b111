"""Code in a process of its own, forked from one that has imported what all of them need and has run no kernel.

Importing torch, timm and scikit-learn takes longer than what most of these processes do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["support.imported"])
# What `python -m karat` runs.
KARAT = 'import runpy; runpy.run_module("karat", run_name="__main__", alter_sys=True)'


class Started:
    """Python code that runs, on one thread."""

    def __init__(self, code: str, *arguments: str, **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with_support = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        before = dict(os.environ)
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": with_support}
        try:
            forkserver.ensure_running()  # it may find what it imports
        finally:
            os.environ.clear()
            os.environ |= before
        self.process = FORKED.Process(target=_run, args=(code, arguments, env, self.folder.name))
        self.process.start()

    def said(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Its status and what it printed, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired("python", timeout, *map(self._printed, ("out", "err")))
        done = subprocess.CompletedProcess[str]("python", self.process.exitcode, *map(self._printed, ("out", "err")))
        self.folder.cleanup()
        return done

    def _printed(self, where: str) -> str:
        return Path(self.folder.name, where).read_text(encoding="utf-8")


def python(code: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python code to its end."""
    return Started(code, *arguments, **environment).said(timeout)


def _run(code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ |= environment
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # as at any process's end; multiprocessing leaves them out


def twice(run: Callable[..., Any], *arguments: Any) -> None:
    """Run it in two processes, launched as torchrun launches them, but forked; it ends where one waits in vain."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(1, 1, 2, max_restarts=0, **where)
    elastic_launch(config, _patient)(run, *arguments)


def _patient(run: Callable[..., Any], *arguments: Any) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    run(*arguments)


def shard() -> None:
    """Runs of this process are sharded from now on, as `accelerate launch --use_fsdp` has it, on GPUs only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from karat.train import engine

    plain = engine.create_accelerator

    def sharding(*arguments: Any, **options: Any) -> Any:
        accelerator = plain(*arguments, **options)
        assert accelerator.distributed_type == DistributedType.MULTI_CPU  # nothing is left of a run before
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
        )
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    engine.create_accelerator = sharding
