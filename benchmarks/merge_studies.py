"""Runs of one study that stand in several results, as one table: seeds trained in other precisions, on other machines.

    python benchmarks/merge_studies.py docs/results/science/study.json docs/results/science/study-float32.json

Prints the Markdown of a study's table, with differences to the row named by --baseline, and the curves; without times,
multiply-adds and measures, which may differ from machine to machine. docs/science.md has its means and deviations from
here.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from karat.study.rows import VariantRow
from karat.study.statistics import Mean, difference
from karat.study.table import markdown, markdown_curves


def merged(paths: list[Path], baseline: str) -> list[VariantRow]:
    """The rows that have runs, in the order of the files, seeds of one name joined.

    ValueError for files of different studies, a name with several settings, one seed twice or a missing baseline.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    studies = [json.loads(path.read_text()) for path in paths]
    titles = {study["title"] for study in studies}
    if len(titles) > 1:
        raise ValueError(f"results of different studies can't be merged: {', '.join(sorted(titles))}")
    for study in studies:
        for row in study["rows"]:
            if row["seeds"]:
                found.setdefault(row["name"], []).append(row)
    if baseline not in found:
        raise ValueError(f"no run of {baseline!r} in these files; there are {', '.join(found)}")
    top1 = {name: Mean.of([curve[-1] for part in parts for curve in part["curves"]]) for name, parts in found.items()}
    return [
        _row(name, parts, top1[name], None if name == baseline else top1[baseline]) for name, parts in found.items()
    ]


def _row(name: str, parts: list[dict[str, Any]], top1: Mean, base: Mean | None) -> VariantRow:
    settings = {(part["attention"], part["epochs"], part["parameters"]) for part in parts}
    if len(settings) > 1:
        raise ValueError(f"{name!r} has attention, epochs and parameters {sorted(settings)}: one row has one setting")
    seeds = tuple(seed for part in parts for seed in part["seeds"])
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{name!r} has a seed twice: {seeds}")
    curves = tuple(tuple(curve) for part in parts for curve in part["curves"])
    return VariantRow(
        name=name,
        attention=parts[0]["attention"],
        epochs=parts[0]["epochs"],
        seeds=seeds,
        planned=len(seeds),
        amp_dtype=parts[0]["amp_dtype"],
        top1=top1,
        curve=tuple(fmean(values) for values in zip(*curves, strict=True)),
        curves=curves,
        difference=None if base is None else difference(top1, base),
        parameters=parts[0]["parameters"],
    )


def main() -> None:
    """Read, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="study.json of each folder")
    parser.add_argument("--baseline", default="softmax")
    options = parser.parse_args()
    rows = merged(options.results, options.baseline)
    print(markdown(rows, options.baseline))
    print(markdown_curves(rows), end="")


if __name__ == "__main__":
    main()
