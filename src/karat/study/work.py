"""The training of a study's runs, by one process or several that share its folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from karat.data.splits import Opener
from karat.study.compare import check_models, noted
from karat.study.measures import measure_run, read_measures
from karat.study.plan import Job, Plan, summary_of
from karat.train.classify import Classification
from karat.train.engine import Trainer

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may work in a run's folder; while inside, no other may.

    The claim is a lock that the operating system holds on folder/.lock: it ends with the process, however that ends,
    so none is ever left behind by a process that was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def train_all(
    plan: Plan,
    *,
    console: Console,
    measure: bool = True,
    before: Callable[[], object] | None = None,
    opened: Opener | None = None,
    failed: Collection[Path] = (),
) -> list[Path]:
    """Train or go on with every run that isn't finished and that no other process trains; the folders of diverged ones.

    failed: of those that are known to diverge, which aren't trained again.

    With `measure`, what `measure_run` tells of each finished run is worked out too, unless it is there.
    `before` is called when all that can be refused was looked at, before the first run.

    Raises ValueError, before any is trained, for runs under other settings and models that can't be built.
    """
    jobs = plan.jobs()
    check_models({job.variant: job.settings for job in jobs if summary_of(job) is None})
    if before is not None:
        before()
    opened = opened or Opener()
    diverged, busy = [*failed], True
    while busy:  # another pass: a process that was killed has left its run
        busy = False
        for number, job in enumerate(jobs, start=1):
            if job.folder in diverged or _is_done(job, measure):
                continue
            with claimed(job.folder) as mine:
                if not mine or _is_done(job, measure):
                    continue
                busy = True
                console.print(f"run {number} of {len(jobs)}: {job.folder.name}", highlight=False, soft_wrap=True)
                with noted(job.folder, diverged, console):
                    if summary_of(job) is None:
                        _train(job, opened, console)
                    if measure:
                        measure_run(job.folder)
    return diverged


def _is_done(job: Job, measure: bool) -> bool:
    """Whether nothing is left to do for a run."""
    return summary_of(job) is not None and not (measure and read_measures(job.folder) is None)


def _train(job: Job, opened: Opener, console: Console) -> None:
    Trainer(Classification(opened), job.settings, console=console).fit()
    if summary_of(job) is None:
        raise OSError(f"{job.folder} was trained, but its summary can't be found")
