"""The end of a run of several processes: their group is left before the interpreter goes, however a process ends.

Gloo works in threads of its own. One that lets go of a tensor after the interpreter began to close has no interpreter
to ask, and the whole process aborts ("terminate called without an active exception"): after the run was finished and
saved, but with a status that makes torchrun call it failed.
"""

from __future__ import annotations

import atexit
import os
import time
from functools import cache
from pathlib import Path

from torch import distributed

THREADS = Path("/proc/self/task")
LONGEST = 5.0  # seconds that the end of a process may wait for threads


def refuse_several(why: str) -> None:
    """Raise ValueError, saying why, under a launcher of several processes: each would do the same and write it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(why)


@cache
def leave_at_exit() -> None:
    """Once a process: have `leave` called when the interpreter ends, after success, errors and signals alike."""
    atexit.register(leave)


def leave() -> None:
    """Destroy the process group, if there is one, and let gloo's threads put down what they hold.

    DistributedDataParallel keeps the group's threads alive beyond its destruction, so they are waited for here.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    distributed.destroy_process_group()
    began, idle = time.monotonic(), 0
    while idle < 3 and time.monotonic() - began < LONGEST:
        time.sleep(0.01)  # without the interpreter's lock, which such a thread may be waiting for
        idle = 0 if busy_threads() else idle + 1


def busy_threads() -> list[str]:
    """The names of gloo's threads that are running or ready to; none where the system does not tell."""
    busy = []
    for thread in THREADS.glob("*") if THREADS.is_dir() else ():
        try:
            name, _, state = (thread / "stat").read_text().partition("(")[2].rpartition(") ")
        except OSError:  # it ended meanwhile
            continue
        if name.startswith("pt_gloo") and not state.startswith("S"):
            busy.append(name)
    return busy
