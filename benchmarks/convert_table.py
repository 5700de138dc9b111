"""The table of docs/results/convert.md: how near converted models start to their teacher, by basis, grid and rank.

    python benchmarks/convert_table.py --teacher RUN --runs FOLDER [SETTING ...]

For each setting: a conversion in closed form (block reports and accuracy before any training), one epoch of it on a
fixed subset of the training images, and the same epoch for the teacher with a random operator of that setting. What is
there already is not done again, so that the table may be made in pieces and on several days. Accuracy is over all
evaluation images. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro
from rich.console import Console

from karat import runs
from karat.operator.config import KArAtConfig
from karat.train.classify import train
from karat.train.convert import Convert, convert_run
from karat.train.measure import evaluate_run

BASES = (
    *("g1b", "g3b", "g5b"),
    *("bspline(grid=1)-b", "bspline(grid=3)-b", "bspline(grid=5)-b"),
    "dog-b",
)
RANKS = ("12", "24", "None")
SETTINGS = tuple(str(KArAtConfig.parse(f"{basis},rank={rank}")) for rank in RANKS for basis in BASES)
# Half of the rate from scratch, decaying from the first update; operators that start at random get the whole of it.
TUNING = {"epochs": 1, "warmup_epochs": 0, "lr": 2e-3, "min_lr": 1e-6}
LEARNING = {**TUNING, "operator_lr_scale": 2.0}
# Behind each entry of a full-rank σ stand 2G·N coefficients instead of R: a tenth of the others' rate.
FULL_TUNING = {**TUNING, "operator_lr_scale": 0.1}
FULL_LEARNING = {**TUNING, "operator_lr_scale": 0.2}
CONTROL = ("softmax",)  # the teacher itself given the same epoch


@dataclass(frozen=True)
class Options:
    """Convert, fine-tune, tabulate."""

    settings: tyro.conf.Positional[tuple[str, ...]] = ()
    """Attentions to add to the table; none: all that it has room for."""
    teacher: Path = Path("runs/cifar10/softmax-s0")
    """The softmax run."""
    runs: Path = Path("runs/convert")
    """Where the runs go."""
    output: Path = Path("docs/results/convert")
    """Table without its suffix."""
    fraction: float = 1.0
    """Share of the training images that the one epoch sees."""
    amp_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of that epoch's forward passes."""
    images: int = 1024
    """Training images for the closed form."""
    parts: tuple[Literal["convert", "tuned", "random"], ...] = ("convert", "tuned", "random")
    """What to make of each row; nothing but the table where none is named."""


def tuned(options: Options, attention: str, start: Path, name: str, epoch: dict[str, Any]) -> None:
    """One epoch from `start` with this attention; accuracy over all evaluation images, in the run's eval.json."""
    folder = options.runs / name
    if (folder / "eval.json").is_file():
        return
    settings, _ = runs.read_config(options.teacher)
    settings = replace(
        settings,
        attention=attention,
        init=str(start),
        output=folder,
        overwrite=True,
        resume=None,
        data_fraction=options.fraction,
        amp_dtype=options.amp_dtype,
        checkpoints="last",
        checkpoint_hist=1,
        track=(),
        recipe=settings.recipe.override(**epoch),
    )
    train(settings)
    evaluate_run(folder, data=settings.data)
    shutil.rmtree(folder / "checkpoints")


def row(options: Options, attention: str) -> None:
    """Make what is missing of one row."""
    slug = runs.slug(attention)
    folder = options.runs / f"{slug}-converted"
    control = attention in CONTROL
    if "convert" in options.parts and not control and not (folder / runs.REPORT).is_file():
        teacher = str(options.teacher)
        convert_run(
            Convert(teacher, attention=attention, output=folder, overwrite=True, images=options.images), Console()
        )
    full = KArAtConfig.parse(attention).rank is None
    start = options.teacher if control else folder
    if "tuned" in options.parts:
        tuned(options, attention, start, f"{slug}-tuned", FULL_TUNING if full else TUNING)
    if "random" in options.parts and not control:
        tuned(options, attention, options.teacher, f"{slug}-random", FULL_LEARNING if full else LEARNING)


def collect(options: Options) -> dict[str, Any]:
    """All rows that are there."""
    teacher, _ = runs.read_config(options.teacher)
    rows = []
    top1 = 0.0
    for attention in SETTINGS:
        slug = runs.slug(attention)
        report = options.runs / f"{slug}-converted" / runs.REPORT
        if not report.is_file():
            continue
        found = json.loads(report.read_text())
        top1 = found["before"]["top1"]
        line: dict[str, Any] = {"attention": attention, "parameters": _parameters(report.parent)}
        line |= {
            "blocks": found["blocks"],
            "seconds": found["seconds_closed_form"],
            "converted": found["after"]["top1"],
        }
        for kind in ("tuned", "random"):
            path = options.runs / f"{slug}-{kind}" / "eval.json"
            line[kind] = json.loads(path.read_text())["top1"] if path.is_file() else None
        rows.append(line)
    control = options.runs / "softmax-tuned" / "eval.json"
    return {
        "teacher": {"settings": teacher.as_dict() | {"output": None}, "top1": top1},
        "images": options.images,
        "fraction": options.fraction,
        "epoch": {
            "tuned": TUNING,
            "tuned_full_rank": FULL_TUNING,
            "random": LEARNING,
            "random_full_rank": FULL_LEARNING,
        },
        "teacher_tuned": json.loads(control.read_text())["top1"] if control.is_file() else None,
        "rows": rows,
    }


def _parameters(folder: Path) -> int:
    count: int = json.loads((folder / runs.SUMMARY).read_text())["parameters"]
    return count


def markdown(table: dict[str, Any]) -> str:
    """The table as it stands in the results."""
    top1 = table["teacher"]["top1"]
    lines = [
        "| basis | rank | explained: mean | min | max | fixed row: mean | top-1 converted | of teacher's "
        "| after one epoch | of teacher's | random, one epoch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in table["rows"]:
        config = KArAtConfig.parse(line["attention"])
        explained = [100 * block["explained"] for block in line["blocks"]]
        fixed = fmean(100 * block["fixed"] for block in line["blocks"])
        cells = [config.basis, "full" if config.rank is None else str(config.rank)]
        cells += [f"{value:.1f}" for value in (fmean(explained), min(explained), max(explained), fixed)]
        for name in ("converted", "tuned"):
            cells += ["", ""] if line[name] is None else [f"{line[name]:.2f}", f"{100 * line[name] / top1:.1f} %"]
        cells.append("" if line["random"] is None else f"{line['random']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make rows, then the table."""
    options = tyro.cli(Options, description=__doc__)
    for attention in options.settings or (*CONTROL, *SETTINGS):
        row(options, attention)
    table = collect(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    if table["rows"]:
        print(markdown(table))


if __name__ == "__main__":
    main()
