"""What benchmarks/score_tasks.py collected: Markdown tables, and learned weights beside the right ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from karat.plots import finish, line_style, looks, new_figure, save
from karat.study.statistics import Mean

DRAWN = ("softmax", "sigmoid", "φ(score), G3", "operator G3, rank 12")
Run = dict[str, Any]


def runs_of(results: Mapping[str, Any], row: str, task: str, size: Sequence[int]) -> list[Run]:
    """The runs that count: those with the rate that was chosen, without the seed that chose it."""
    chooser = results["configuration"]["rate_chosen_with_seed"]
    wanted = (row, task, list(size))
    found = [run for run in results["runs"] if (run["row"], run["task"], run["size"]) == wanted]
    return [run for run in found if run["seed"] != chooser]


def tables(results: Mapping[str, Any]) -> str:
    """A table of all attentions at the first size, and one of all sizes."""
    tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
    sizes = [list(size) for size in dict.fromkeys(tuple(run["size"]) for run in results["runs"])]
    first = [["explained, %", *tasks, "count, exact answers", "parameters"]]
    others = [["explained, %", *(f"{task}, N = {N}, D = {D}" for task in tasks for N, D in sizes)]]
    for row in results["rows"]:
        found = {(task, *size): runs_of(results, row, task, size) for task in tasks for size in sizes}
        at_first = [found[task, *sizes[0]] for task in tasks]
        if not all(at_first):
            continue
        parameters = f"{at_first[0][0]['parameters']:,}"
        first.append([row, *(percent(r, "explained") for r in at_first), percent(at_first[0], "exact"), parameters])
        if len(sizes) > 1 and all(found.values()):
            others.append([row, *(percent(runs, "explained") for runs in found.values())])
    return "\n\n".join(_markdown(lines) for lines in (first, others) if len(lines) > 1)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def percent(runs: Sequence[Run], name: str) -> str:
    """Mean ± sample deviation over the seeds."""
    mean = Mean.of([100 * run[name] for run in runs])
    return f"{mean.mean:.1f} ± {mean.deviation:.1f}" if mean.deviation is not None else f"{mean.mean:.1f}"


def fitted(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Learned weights with the scale and the constant that bring them nearest to the right ones, where these are.

    Values and what follows them scale all weights; a constant is the same for all keys.
    """
    known = ~np.isnan(right)
    ones = np.ones_like(found)
    factors = np.linalg.lstsq(np.stack([found, ones], 1)[known], right[known], rcond=None)[0]
    return np.stack([found, ones], 1) @ factors


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A panel a task: what a key weighs over its similarity to the query, the best of the seeds on held-out scenes."""
    from score_tasks import right_weights

    line = np.array(results["configuration"]["line"])
    tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
    size = results["runs"][0]["size"]
    with looks():
        figure = new_figure(7.4, 2.9)
        handles: dict[str, Any] = {}
        for panel, task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
            right = right_weights(task, torch.tensor(line), size[0]).numpy()
            style = {"color": "black", "linewidth": 3.0, "alpha": 0.35}
            (handles["right"],) = panel.plot(line, right, solid_capstyle="butt", **style)
            panel.plot(line[-1:], right[-1:], marker="o", markersize=5, **style)
            for index, row in enumerate(name for name in DRAWN if name in results["rows"]):
                found = runs_of(results, row, task, size)
                best = max(found, key=lambda run: run["held_out"])
                share = fmean(100 * run["explained"] for run in found)
                learned = fitted(np.array(best["weights"]), right)
                (handles[row],) = panel.plot(line, learned, **line_style(index), label=f"{share:.0f} %")
            finish(panel, task, "similarity of key and query", "weight (fitted)" if task == tasks[0] else "")
            panel.legend(loc="best", fontsize=6.5, title="explained", title_fontsize=6.5)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=7.5)
    save(figure, path)
