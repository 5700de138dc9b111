"""The tables and the figure of wider models and longer training, from what `karat compare --study` wrote of them.

The studies are docs/studies/starts-width.toml and starts-horizon.toml; starts-rivals.toml has softmax's best start.
Points lost by averaging attention over images are those of `karat analyze averaging` on the runs of longer training.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from statistics import fmean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from starts_answer import MARKERS, read

from karat.plots import INK, drawing, finish, line_style, whole_epochs
from karat.study.effects import Fit
from karat.study.rows import VariantRow

STARTED = "mimetic, strong"  # weights and positions of the rivals
ATTENTIONS = ("softmax", "static beside it", "operator in place", "operator beside it")
HORIZONS = (4, 12, 36)
Gain = tuple[float, float | None]  # points over softmax, and half the interval of 95 %


def wide() -> list[tuple[str, str, str, str, int]]:
    """At dim 96, depth 6: top-1 ± deviation, points over softmax, the least that would have been seen, runs."""
    study, lines = read("starts-width"), []
    effects = {effect["level"]: effect for effect in study["effects"]}
    for row in study["rows"]:
        runs = [curve[-1] for curve in row["curves"]]
        gain = effects.get(row["name"])
        over = ("", "")
        if gain is not None:
            over = (shown(gain["difference"], gain["high"] - gain["difference"]), f"{gain['least_seen']:.1f}")
        lines.append((row["name"], f"{fmean(runs):.1f} ± {stdev(runs):.1f}", *over, len(runs)))
    fit, last = rivals("starts-width", "dim 96")
    for name, runs in last.items():
        if name.endswith(STARTED):
            gain, half, least = fit.difference([(name, "softmax")])
            top1 = f"{fmean(runs):.1f}" + (f" ± {stdev(runs):.1f}" if len(runs) > 1 else "")
            lines.append((name, top1, shown(gain, half), f"{least:.1f}", len(runs)))
    return lines


def rivals(study: str, size: str) -> tuple[Fit, dict[str, list[float]]]:
    """The cells of a study with the rivals of that size among them, and the last top-1 of each one's runs."""
    rows = [row for row in read(study)["rows"] if row["levels"]]
    for row in read("starts-rivals")["rows"]:
        name, its_size = row["name"].split(", ")
        if its_size == size and row["seeds"]:
            rows.append(row | {"name": f"{name}, {STARTED}"})
    kept = ("name", "attention", "epochs", "planned", "amp_dtype", "seeds", "curves")
    fit = Fit.of([VariantRow(**{key: row[key] for key in kept}) for row in rows])
    return fit, {row["name"]: [curve[-1] for curve in row["curves"]] for row in rows}


def apart(fit: Fit, ours: str, theirs: str) -> str:
    """One cell minus another with its interval of 95 %."""
    found, half, _ = fit.difference([(ours, theirs)])
    return shown(found, half)


def ends() -> dict[tuple[str, int], list[float]]:
    """The last top-1 of each run, by attention and epochs."""
    rows = read("starts-horizon")["rows"]
    return {(row["name"].split(", ")[0], row["epochs"]): [curve[-1] for curve in row["curves"]] for row in rows}


def gains() -> dict[tuple[str, int], Gain]:
    """Points over softmax trained as long, and half their interval; where both have one run, as other cells scatter.

    In cells of n paired seeds the interval is ± t s √(2/n); single runs have the same t and s, and n = 1.
    """
    found, singles, runs = dict[tuple[str, int], Gain](), list[float](), ends()
    for effect in read("starts-horizon")["effects"]:
        if effect["within"]:
            key = effect["level"], int(effect["within"]["horizon"].split()[0])
            half = None if effect["high"] is None else effect["high"] - effect["difference"]
            found[key] = (effect["difference"], half)
            singles += [] if half is None else [half * sqrt(len(runs[key]))]
    for (name, epochs), values in runs.items():
        if name != "softmax" and (name, epochs) not in found and values and runs["softmax", epochs]:
            gain = values[0] - runs["softmax", epochs][0]
            found[name, epochs] = (gain, fmean(singles) if singles else None)
    return found


def shown(gain: float, half: float | None) -> str:
    """Points over softmax with their interval of 95 %, where there is one."""
    interval = "" if half is None else f" ({gain - half:+.1f} to {gain + half:+.1f})"
    return f"{gain:+.1f}{interval}".replace("-", "−")


def long() -> list[list[str]]:
    """Of each attention its top-1 after so many epochs, and what it has over softmax."""
    runs, over_softmax = ends(), gains()

    def cells(name: str) -> Iterator[str]:
        for epochs in HORIZONS:
            values = runs.get((name, epochs), [])
            yield f"{fmean(values):.1f} ({len(values)})" if values else "–"
        for epochs in HORIZONS:
            gain = over_softmax.get((name, epochs))
            yield "" if gain is None else shown(*gain)

    lines = [[name, *cells(name)] for name in ATTENTIONS]
    fit, last = rivals("starts-horizon", "12 epochs")
    for name, values in last.items():
        if name.endswith(STARTED):
            top1, gain = f"{fmean(values):.1f} ({len(values)})", apart(fit, name, "softmax, 12 epochs")
            lines.append([name, "–", top1, "–", "", gain, ""])
    return lines


def lost() -> dict[str, list[list[dict[str, float]]]]:
    """Of each attention the lines of its runs: points lost by averaging at every fourth epoch."""
    names = {row["attention"]: row["name"].split(", ")[0] for row in read("starts-horizon")["rows"]}
    found: dict[str, list[list[dict[str, float]]]] = {}
    for label, run in read("averaging").items():  # "g1b,rank=24 seed 1", "g1b,rank=24 (folder)"
        found.setdefault(names[label.split(" (")[0].split(" seed ")[0]], []).append(run["epochs"])
    return found


def figure() -> Figure:
    """Points over softmax after so many epochs; points lost by averaging attention over images, along training."""
    with drawing(7.4, 3.0, columns=2) as (drawn, (left, right)):
        for index, name in enumerate(ATTENTIONS[1:], 1):
            marks = [(epochs, *gain) for (level, epochs), gain in sorted(gains().items()) if level == name]
            at, middle, half = zip(*marks, strict=True)
            shifted = [epochs * 1.04 ** (index - 2) for epochs in at]
            style = line_style(index, 1.0) | {"marker": MARKERS[index], "markersize": 4.5, "capsize": 2.5}
            left.errorbar(shifted, middle, yerr=[one or 0.0 for one in half], label=name, **style)
        left.axhline(0, color=INK, linewidth=0.8)
        left.set_xscale("log")
        left.set_xticks(HORIZONS, [str(epochs) for epochs in HORIZONS])
        left.xaxis.set_minor_formatter(NullFormatter())
        left.tick_params(axis="x", which="minor", length=0)
        sure = any(half for _, half in gains().values())
        finish(left, f"points over softmax{', 95 % intervals' if sure else ''}", "epochs of training")
        for name, runs in sorted(lost().items(), key=lambda item: ATTENTIONS.index(item[0])):
            style = line_style(ATTENTIONS.index(name)) | {"marker": MARKERS[ATTENTIONS.index(name)], "markersize": 3}
            for number, lines in enumerate(runs):
                epochs, values = zip(*((line["epoch"], line["lost"]) for line in lines), strict=True)
                right.plot(epochs, values, label=None if number else name, **style)
        finish(right, "points lost by averaging attention over images", "epoch")
        whole_epochs(right)
        right.set_ylim(top=49)
        right.legend(loc="upper right", ncols=2)
    return drawn
