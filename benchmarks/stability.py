"""Does learnable attention train wherever softmax trains? The numbers of docs/training-stability.md.

    OMP_NUM_THREADS=1 python benchmarks/stability.py --data-root ../shared/data --output runs/stability
    python benchmarks/stability.py --output runs/stability --collect docs/results/stability.json --table

The first trains what benchmarks/stability.toml asks for, run by run, and may be started in several terminals at
once, stopped and started again: a run is an ordinary folder TASK--ATTENTION-lrX-sS (without its checkpoints once it is
finished), claimed by a lock, skipped when it is finished and gone on with when it was cut off. One that diverges has
the reason in diverged.txt and counts as a quality of 0. The second trains nothing and writes what is finished.

Runs of a version before, in another folder of the same layout, join with --before.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import karat
from karat.detect.settings import DetectSettings
from karat.detect.task import Detection
from karat.errors import TrainingDiverged
from karat.runs.classification import Settings
from karat.study.work import claimed
from karat.train.classify import Classification
from karat.train.engine import Trainer

MACHINE, DIVERGED = "machine.json", "diverged.txt"
SPENT = ("seconds", "cpu_seconds")
Run = dict[str, Any]  # one run as the JSON has it


@dataclass(frozen=True)
class Options:
    """Train the study, or with --collect, --table or --figure show what is finished of it."""

    study: Path = Path("benchmarks/stability.toml")
    """Tasks and attentions."""
    data_root: Path = Path("../shared/data")
    """Where the folders of the tasks' data lie."""
    output: Path = Path("runs/stability")
    """The folder of the runs' folders."""
    only: tuple[str, ...] = ()
    """The tasks to train, by name; none: all."""
    attentions: tuple[str, ...] = ()
    """The attentions to train, by name; none: all."""
    max_minutes: float = math.inf
    """No run is begun after so many minutes."""
    before: Path | None = None
    """The folder of runs of the version before, to be collected too."""
    collect: Path | None = None
    """Write what is finished as JSON."""
    results: Path = Path("docs/results/stability.json")
    """The JSON that --table and --figure read, where --collect doesn't write one."""
    table: bool = False
    """Print the tables, as Markdown."""
    figure: Path | None = None
    """Draw the figure."""


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is trained, but for attention, rate and seed. Tasks of one stage are trained mixed.

    criterion: what a quality is held against, the row's "own best" or "softmax" at the same rate.
    """

    name: str
    kind: str
    metric: str
    rates: tuple[float, ...]
    seeds: int
    settings: Mapping[str, Any]
    folder: str | None = None
    stage: int = 1
    criterion: str = "own best"


@dataclass(frozen=True)
class Row:
    """An attention; tasks, rates and seeds restrict where it is trained. A name may have rows for different tasks."""

    name: str
    attention: str
    tasks: tuple[str, ...] | None = None
    rates: tuple[float, ...] | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Job:
    """One run."""

    task: Task
    row: Row
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task.name}--{re.sub(r'[^0-9A-Za-z]+', '-', self.row.name)}-lr{self.rate:g}-s{self.seed}"


def read_study(path: Path) -> tuple[list[Task], list[Row]]:
    """Raises TypeError for a key that tasks or attentions don't have."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    tasks = [Task(name, **{**values, "rates": tuple(values["rates"])}) for name, values in found["tasks"].items()]
    return tasks, [Row(**row) for row in found["attentions"]]


def make_jobs(tasks: Sequence[Task], rows: Sequence[Row]) -> list[Job]:
    """All runs in the order in which they are trained, so that what there is of a study at any time tells most.

    A seed before the next, a stage before the next, the middle three rates of all attentions before the outer ones;
    then task by task, the middle rate before its neighbours, softmax before the others.
    """
    keyed = []
    for place, task in enumerate(tasks):
        for number, row in enumerate(rows):
            if row.tasks is not None and task.name not in row.tasks:
                continue
            for index, rate in enumerate(task.rates):
                ring = int(abs(index - (len(task.rates) - 1) / 2))  # 2 1 0 1 2 of five, 0 0 of two
                for seed in range(task.seeds if row.seeds is None else row.seeds):
                    if row.rates is None or rate in row.rates:
                        key = (seed, task.stage, ring > 1, place, ring, number, index)
                        keyed.append((key, Job(task, row, rate, seed)))
    return [job for _, job in sorted(keyed, key=lambda pair: pair[0])]


def choose(jobs: Sequence[Job], tasks: Sequence[str], attentions: Sequence[str]) -> list[Job]:
    """The jobs of these tasks and attentions; none named: of all. Raises ValueError for a name there isn't."""
    for given, known in ((tasks, {job.task.name for job in jobs}), (attentions, {job.row.name for job in jobs})):
        for name in given:
            if name not in known:
                raise ValueError(f"the study has no {name!r}; it has {', '.join(sorted(known))}")
    return [
        job for job in jobs if (not tasks or job.task.name in tasks) and (not attentions or job.row.name in attentions)
    ]


# -- training ---------------------------------------------------------------------------------------------------------


def train(job: Job, folder: Path, data_root: Path, data: Any) -> Any:
    """Train a run, or go on with it; returns the data that it read. All that this file knows of trainers is here.

    Raises TrainingDiverged.
    """
    values = {**job.task.settings, "attention": job.row.attention, "lr": job.rate, "seed": job.seed, "output": folder}
    values |= {"device": "cpu", "track": (), "checkpoint_hist": 1, "resume": "auto"}
    if job.task.folder is not None:
        values["data"] = str((data_root / job.task.folder).resolve())
    trainer: Trainer
    if job.task.kind == "detect":
        trainer = Trainer(Detection(), DetectSettings.make(**values), data)
    else:
        trainer = Trainer(Classification(), Settings.make(**values), data)
    trainer.fit()
    return trainer.data


def is_done(job: Job, folder: Path) -> bool:
    """Whether a run is finished or has diverged; ValueError for one under other settings than the study's."""
    if not (folder / "config.json").is_file():
        return False
    found = json.loads((folder / "config.json").read_text())["settings"]
    found = {**found, **found["recipe"], "recipe": found.get("preset")}
    for name, value in {**job.task.settings, "lr": job.rate, "seed": job.seed}.items():
        if found.get(name) != value:
            raise ValueError(f"{folder}: {name} was {found.get(name)!r} and is now {value!r}; give another --output")
    if (folder / DIVERGED).is_file():
        return True
    summary = folder / "summary.json"
    return summary.is_file() and bool(json.loads(summary.read_text())["finished"])


def work(jobs: Sequence[Job], options: Options) -> None:
    """Train every run that isn't finished and that no other process trains."""
    torch.set_num_threads(1)
    end, source = time.monotonic() + 60 * options.max_minutes, digest_of_package()
    shared: tuple[Any, Any] = (None, None)  # task and seed of the last run, and its data
    busy = True
    while busy:  # another pass: a process that was killed has left its run
        busy = False
        for job in jobs:
            folder = options.output / job.name
            if is_done(job, folder):
                continue
            if time.monotonic() > end:
                return
            with claimed(folder) as mine:
                if not mine or is_done(job, folder):
                    continue
                busy = True
                print(job.name, end=": ", flush=True)
                key = (job.task.name, job.seed)
                shared = (key, train_and_note(job, folder, options, shared[1] if key == shared[0] else None, source))
                print(describe(job, folder), flush=True)


def train_and_note(job: Job, folder: Path, options: Options, data: Any, source: str) -> Any:
    """Train one run and note how it ended, where, and in what time, whose parts add up where a run was cut off."""
    path, clocks = folder / MACHINE, (time.monotonic, time.process_time)
    before = json.loads(path.read_text()) if path.is_file() else dict.fromkeys(SPENT, 0.0)
    began = [before[name] - clock() for name, clock in zip(SPENT, clocks, strict=True)]

    def note() -> None:
        spent = {name: start + clock() for name, start, clock in zip(SPENT, began, clocks, strict=True)}
        path.write_text(json.dumps({**machine(), "source": source, **spent}, indent=1) + "\n", encoding="utf-8")

    note()
    try:
        data = train(job, folder, options.data_root, data)
    except TrainingDiverged as error:
        (folder / DIVERGED).write_text(f"{error}\n", encoding="utf-8")
    finally:
        note()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return data


def describe(job: Job, folder: Path) -> str:
    """A finished run in one line."""
    run = read_run(job, folder)
    said = "diverged" if run["diverged"] else f"{run['quality']:.1f}"
    return f"{said} {job.task.metric}, {run['cpu_seconds']:.0f} s of one core"


def machine() -> dict[str, Any]:
    """The processor and its instructions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.is_file() else []
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": names[0] if names else "unknown", "instructions": capability, "avx512": "512" in capability}


def digest_of_package() -> str:
    """Of the package's source: two versions that have the same number, before and after a change, differ here."""
    root = Path(str(karat.__file__)).parent
    content = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(content).hexdigest()[:12]


# -- results ----------------------------------------------------------------------------------------------------------


def read_run(job: Job, folder: Path) -> Run:
    """A finished run's numbers."""
    config, noted = (json.loads((folder / name).read_text()) for name in ("config.json", MACHINE))
    metrics = folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    curve = [line.get(job.task.metric, 0.0) for line in history]
    diverged = folder / DIVERGED
    batch = config["settings"]["recipe"]["batch_size"]
    return {
        "task": job.task.name,
        "attention": job.row.name,
        "rate": job.rate,
        "peak": job.rate * batch / 512 if job.task.kind == "classify" else job.rate,
        "seed": job.seed,
        "quality": 0.0 if diverged.is_file() else curve[-1],
        "curve": curve,
        "norms": [line["grad_norm"] for line in history],
        "diverged": diverged.read_text(encoding="utf-8").strip() if diverged.is_file() else None,
        **{name: noted.pop(name) for name in SPENT},
        "where": {**noted, **config["versions"]},
    }


def collect(tasks: Sequence[Task], jobs: Sequence[Job], folder: Path, before: Path | None) -> dict[str, Any]:
    """All runs that are finished; `machines` holds once what many share: processor, versions, digest of the source."""
    places = [(folder, False), *([] if before is None else [(before, True)])]
    found: list[Run] = []
    machines: list[dict[str, Any]] = []
    for place, earlier in places:
        for job in jobs:
            if is_done(job, place / job.name):
                run = read_run(job, place / job.name)
                where = run.pop("where")
                if where not in machines:
                    machines.append(where)
                found.append({**run, "machine": machines.index(where), "before": earlier})
    about = {task.name: {"metric": task.metric, "criterion": task.criterion} for task in tasks}
    names = list(dict.fromkeys(job.row.name for job in jobs))
    return {"tasks": about, "attentions": names, "machines": machines, "runs": found}


def as_text(results: Mapping[str, Any]) -> str:
    """JSON with a line a run."""
    runs = ",\n  ".join(json.dumps(_rounded(run)) for run in results["runs"])
    head = json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=1)
    return head[:-2] + f',\n "runs": [\n  {runs}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else value


def main() -> None:
    """Train, or show what is finished."""
    options = tyro.cli(Options, description=__doc__)
    tasks, rows = read_study(options.study)
    jobs = make_jobs(tasks, rows)
    if options.collect is None and not options.table and options.figure is None:
        work(choose(jobs, options.only, options.attentions), options)
        return
    if options.collect is not None:
        options.collect.parent.mkdir(parents=True, exist_ok=True)
        options.collect.write_text(as_text(collect(tasks, jobs, options.output, options.before)), encoding="utf-8")
    results = json.loads((options.collect or options.results).read_text(encoding="utf-8"))
    import stability_results as shown

    if options.table:
        print(shown.tables(results))
    if options.figure is not None:
        shown.draw(results, options.figure)


if __name__ == "__main__":
    main()
