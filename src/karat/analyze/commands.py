"""The commands that look at runs: `karat analyze`, `karat report`, `karat explore`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from karat.analyze.analyses import ANALYSES, analysis_of
from karat.analyze.subject import Options
from karat.errors import parse
from karat.values import Count, File, Folder, Range

if TYPE_CHECKING:
    What = str
else:
    What = Literal[tuple(ANALYSES)]
Format = Literal["png", "svg", "pdf"]


@dataclass(frozen=True, kw_only=True)
class Analyze(Options):
    """Look at one thing in one run or several: figures, numbers and arrays, in RUN/analysis/WHAT."""

    what: tyro.conf.Positional[What]
    """What to look at; peers: parameters against accuracy, of comparisons and runs, beside published models."""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of the runs; a comparison's folder means its runs."""
    formats: tuple[Format, ...] = ("png",)
    """File formats of the figures."""
    output: Folder | None = None
    """Another folder for the result; none: analysis/WHAT in the first folder that is named."""


@dataclass(frozen=True, kw_only=True)
class Report(Options):
    """Write one self-contained HTML page about one run or several side by side; it opens offline."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The folders of the runs; a comparison's folder means its runs."""
    sections: tuple[str, ...] = ()
    """Sections of the page; none: all of them."""
    output: File | None = None
    """The page's file; none: report.html in the first folder that is named."""
    points: Annotated[int, Range("give 3 to 1001", 3, 1001)] = 11
    images: Count = 4
    eigenvalues: Count = 1
    probes: Count = 5
    hessian_samples: Count = 16


@dataclass(frozen=True)
class Explore:
    """Look into a run in the browser: drop an image, pick a block and a head."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    weights: Literal["last", "best", "ema"] = "last"
    """Weights of the last epoch, of the epoch with the highest top-1, or averaged ones."""
    host: str = "127.0.0.1"
    """Address to serve on; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Range("give a port from 1 to 65535", 1, 65535)] = 7860
    """Port to serve on."""
    browser: bool = True
    """Open the page in the browser."""


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first of many points."""
    with ExitStack() as stack:
        shown: list[tuple[Progress, TaskID]] = []

        def advance(done: int, total: int) -> None:
            if not shown:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                progress = stack.enter_context(Progress(*columns, transient=True))
                shown.append((progress, progress.add_task(text)))
            progress, task = shown[0]
            progress.update(task, completed=done, total=total)

        yield advance


def analyze(arguments: Sequence[str]) -> None:
    """karat analyze."""
    parsed = parse(lambda: tyro.cli(Analyze, args=arguments, prog="karat analyze"), "karat analyze")
    from karat.analyze.analysis import FOLDER
    from karat.analyze.subject import open_subjects

    with _bar(parsed.what) as progress:
        seen = parsed.runs if parsed.what == "peers" else open_subjects(parsed.runs, parsed, progress)
        analysis = analysis_of(parsed.what)(seen)
    folder = parsed.output or parsed.runs[0] / FOLDER / parsed.what
    for note in analysis.notes:
        print(f"note: {note}")
    for path in analysis.write(folder, parsed.formats):
        print(path)


def report(arguments: Sequence[str]) -> None:
    """karat report."""
    parsed = parse(lambda: tyro.cli(Report, args=arguments, prog="karat report"), "karat report")
    from karat.analyze.report import SECTIONS, write_report

    with _bar("landscape") as progress:
        path = write_report(
            parsed.runs,
            parsed,
            output=parsed.output,
            sections=parsed.sections or tuple(SECTIONS),
            announce=lambda name: print(f"{name} …"),
            progress=progress,
        )
    print(f"report: {path}")


def explore(arguments: Sequence[str]) -> None:
    """karat explore."""
    parsed = parse(lambda: tyro.cli(Explore, args=arguments, prog="karat explore"), "karat explore")
    from karat.analyze.explore import serve

    serve(**vars(parsed))
