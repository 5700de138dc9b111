"""The tables and the figure of docs/results/peers.md, from the comparisons in runs/peers and the measured step times.

    python benchmarks/peers.py --train     trains what is missing (on two cores about half an hour), then writes
    python benchmarks/peers.py --step      measures step times and memory on an idle machine, then writes
    python benchmarks/peers.py             writes docs/results/peers.md, its JSON and its figure

A training that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from karat import cli

RUNS, RESULTS = Path("runs/peers"), Path("docs/results")
CIFAR = "../shared/data/cifar10"
DEEP = tuple(
    f"deep_kan(order={order},grid={grid},range={reach},layers={layers})"
    for order, grid, reach, layers in (
        (1, 10, 4, "(10,10)"),
        (3, 10, 4, "(10,10)"),
        (3, 40, 8, "(10,10)"),
        (5, 10, 1, "(10,10)"),
        (5, 10, 4, "(10,10)"),
        (5, 10, 8, "(10,10)"),
        (5, 40, 4, "(10,10)"),
        (5, 10, 4, "(20,40)"),
        (5, 10, 4, "(40,40)"),
    )
)
MLPS = ("", "/kan", "/grkan", "/fourierkan", "/fastkan")
VITS = (*(f"{attention}{mlp}" for attention in ("softmax", "g3b") for mlp in MLPS), "g3u", "g3b,residual=softmax")


class Part(NamedTuple):
    """One comparison: its title, contenders, options of karat compare, and the file with its step times."""

    title: str
    contenders: tuple[str, ...]
    options: str
    steps: str | None


PARTS = {
    "vit-cifar10": Part(
        "A small ViT with each MLP and each attention, CIFAR-10",
        VITS,
        f"--data {CIFAR} --data-fraction 0.2 --epochs 2 --warmup-epochs 1",
        "mlp_step_small",
    ),
    "deep-cifar10": Part(
        "Deep KANs of Table 14, CIFAR-10", DEEP, f"--data {CIFAR} --epochs 2 --warmup-epochs 1", "deep_kan_step"
    ),
    "deep-digits": Part("Deep KANs of Table 14, digits", DEEP, "--data digits --img-size 8", None),
}


def train_command(name: str) -> list[str]:
    """karat compare's arguments for a part."""
    part = PARTS[name]
    return ["compare", *part.contenders, *part.options.split(), "--output", str(RUNS / name), "--resume", "auto"]


def step_command(part: Part) -> list[str]:
    """benchmarks/mlp_step.py's arguments for a part."""
    options = "--small --batch 128 --rounds 3 --threads 2 --output docs/results/performance --name"
    return ["benchmarks/mlp_step.py", *options.split(), str(part.steps), "--contenders", *part.contenders]


def measured_steps(part: Part) -> dict[str, dict[str, Any]]:
    """Rows of the step measurement by contender; empty where there is none."""
    path = RESULTS / "performance" / f"{part.steps}.json"
    return {row["contender"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def table(part: Part, found: dict[str, Any]) -> list[str]:
    """A Markdown table of one comparison."""
    steps = measured_steps(part) if part.steps else {}
    first = next(iter(steps), None)
    costs = " step, ms (× the first row's) | memory, MiB |" if first else " step, ms | memory, MiB |"
    lines = [f"| contender | top-1 % | parameters | multiply-adds, M |{costs}", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        timed = steps.get(row["attention"])
        step, memory = f"{row['ms_per_step']:.3g}", f"{row['peak_memory_mib']:,.0f}"
        if timed:
            step = f"{timed['median ms']:.3g} ({timed[f'× {first}']:.2f})"
            memory = f"{timed['peak MiB']:,.0f}"
        operations = row["multiply_adds"] / 1e6
        lines.append(
            f"| {row['attention']} | {row['top1']:.2f} | {row['parameters']:,} | {operations:.3g} | {step} | {memory} |"
        )
    return lines


def section(name: str, found: dict[str, Any]) -> list[str]:
    """One part of the page: commands, conditions, table."""
    part, settings = PARTS[name], found["settings"]
    recipe, images = settings["recipe"], evaluation_images(found)
    error = 100 * math.sqrt(0.25 / images)
    size = "" if settings["data_fraction"] == 1 else f" on {settings['data_fraction']:.0%} of the training images"
    lines = [
        f"## {part.title}",
        "",
        "```",
        "karat " + shlex.join([word for word in train_command(name) if word not in ("--resume", "auto")]),
    ]
    if part.steps and measured_steps(part):
        lines.append("python " + shlex.join(step_command(part)))
    costs = (
        "Step time and memory are those of the second command on an idle machine: AdamW at batch 128, memory above "
        "the idle process."
        if part.steps and measured_steps(part)
        else "Step time is the median while other work shared the machine; memory is the whole process's peak."
    )
    return [
        *lines,
        "```",
        "",
        f"{recipe['epochs']} epochs{size}, batch {recipe['batch_size']}, recipe `{settings['preset']}`, "
        f"{found['seeds']} seed; top-1 of the last epoch on {images:,} evaluation images (standard error up to "
        f"{error:.1f} points). {costs}",
        "",
        *table(part, found),
        "",
    ]


def evaluation_images(found: dict[str, Any]) -> int:
    """How many images the accuracies are of."""
    lines = (Path(found["rows"][0]["runs"][0]) / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["images"])


def write() -> None:
    """docs/results/peers.md, peers/*.json, peers/parameters-accuracy.png."""
    folder = RESULTS / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    done = [name for name in PARTS if (RUNS / name / "compare.json").is_file()]
    page = [
        "# The peers, measured",
        "",
        "*Measured with the start and the rates of version 0.1.*",
        "",
        "Written by `python benchmarks/peers.py` from the JSON beside it (peers/, performance/). CIFAR-10 is the real",
        "one, re-encoded as JPEG; the digits are scikit-learn's. 2 CPU cores, float32. Short runs with one seed, the",
        "same for all rows of a table: they show that each peer trains and what it costs, not which is best when",
        "trained out.",
        "",
        "![Parameters against accuracy](peers/parameters-accuracy.png)",
        "",
        "`karat analyze peers "
        + " ".join(str(RUNS / name) for name in done)
        + "` draws this figure: hollow points are",
        "published figures on ImageNet-1K, filled ones the tables below.",
        "",
    ]
    for name in done:
        shutil.copyfile(RUNS / name / "compare.json", folder / f"{name}.json")
        page += section(name, json.loads((folder / f"{name}.json").read_text()))
    (RESULTS / "peers.md").write_text("\n".join(page).rstrip() + "\n")
    drawn = ["analyze", "peers", *(str(RUNS / name) for name in done), "--output", str(RUNS / "figure")]
    if cli.main(drawn) == 0:
        shutil.copyfile(RUNS / "figure" / "parameters-accuracy.png", folder / "parameters-accuracy.png")
    missing = [name for name in PARTS if name not in done]
    print(
        f"{RESULTS / 'peers.md'}: {', '.join(done)}" + (f"; not trained yet: {', '.join(missing)}" if missing else "")
    )


def main() -> int:
    """Train or measure if asked, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train what is missing first")
    parser.add_argument("--step", action="store_true", help="measure step times first")
    options = parser.parse_args()
    status = 0
    for name, part in PARTS.items():
        if options.train:
            status = cli.main(train_command(name)) or status
        if options.step and part.steps:
            subprocess.run([sys.executable, *step_command(part)], check=True)
    write()
    return status


if __name__ == "__main__":
    sys.exit(main())
