"""What benchmarks/stability.py collected, as Markdown tables with the study's criteria, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karat.plots import COLOURS, DASHES, finish, looks, new_figure, save
from karat.study.statistics import Mean, difference

SHARE = 0.9  # of its own best, or of softmax's, that a quality must keep
NORMS = 10.0  # times softmax's gradient norm of the same epoch that none may exceed
BASELINE = "softmax"
METRICS = {"top1": "top-1 (%)", "box_AP50": "box AP50 (%)"}
Run = dict[str, Any]  # one run as the JSON has it


@dataclass
class Cells:
    """The runs of one task, by row and peak rate; the rows in the study's order, those of the version before last."""

    runs: dict[str, dict[float, list[Run]]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, Any], task: str) -> Cells:
        """Of what `collect` gave."""
        cells = cls()
        for earlier in (False, True):
            for name in results["attentions"]:
                row: dict[float, list[Run]] = {}
                for run in results["runs"]:
                    if (run["task"], run["attention"], run["before"]) == (task, name, earlier):
                        row.setdefault(run["peak"], []).append(run)
                if row:
                    cells.runs[f"{name}, before" if earlier else name] = dict(sorted(row.items()))
        return cells

    def rates(self) -> list[float]:
        """All peak rates."""
        return sorted({rate for row in self.runs.values() for rate in row})

    def mean(self, name: str, rate: float) -> Mean | None:
        """The final quality; None where no run is finished."""
        found = next((runs for at, runs in self.runs[name].items() if math.isclose(at, rate)), None)
        return None if found is None else Mean.of([run["quality"] for run in found])

    def best(self, name: str) -> tuple[float, float]:
        """A row's highest mean and its peak rate."""
        means = {rate: Mean.of([run["quality"] for run in runs]).mean for rate, runs in self.runs[name].items()}
        rate = max(means, key=means.__getitem__)
        return means[rate], rate

    def share(self, name: str, rate: float) -> tuple[float, float] | None:
        """The quality there as a share of the row's own best, and its standard error; None where no run is finished."""
        mean, (best, at) = self.mean(name, rate), self.best(name)
        if mean is None or not best:
            return None if mean is None else (0.0, 0.0)
        top, share = self.mean(name, at), mean.mean / best
        same = top is None or math.isclose(rate, at)
        return share, 0.0 if same else math.hypot(error(mean), share * error(top)) / best

    def norms(self, name: str, rate: float) -> float:
        """The largest gradient norm of a row's runs over the largest of softmax's in the same epoch."""
        ours, theirs = (
            [max(norms) for norms in zip(*(run["norms"] for run in self.runs[one][rate]), strict=False)]
            for one in (name, BASELINE)
        )
        return max((a / b for a, b in zip(ours, theirs, strict=False)), default=math.inf)

    def diverged(self, name: str, rates: Sequence[float]) -> int:
        """How many of a row's runs diverged at these rates."""
        some = [run for at, runs in self.runs[name].items() if any(math.isclose(at, r) for r in rates) for run in runs]
        return sum(run["diverged"] is not None for run in some)


def error(mean: Mean) -> float:
    """The standard error of a mean; 0 with one run, which has none."""
    return (mean.deviation or 0.0) / math.sqrt(mean.count)


def number(rate: float) -> str:
    """A rate, short.

    >>> number(2.5e-4), number(1e-3), number(6.25e-4)
    ('2.5e-4', '1e-3', '6.25e-4')
    """
    mantissa, _, power = f"{rate:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def tables(results: Mapping[str, Any]) -> str:
    """Per task the qualities by rate; then what becomes of the criteria."""
    parts, verdicts = [], []
    for task, about in results["tasks"].items():
        cells = Cells.of(results, task)
        if not cells.runs:
            continue
        title = f"**{task}**, {METRICS[about['metric']]}: mean ± standard error (runs)"
        parts.append(f"{title}\n\n{quality_table(cells)}")
        if BASELINE in cells.runs:
            judge = against_softmax if about["criterion"] == "softmax" else against_own_best
            verdicts.append(f"**{task}**: {judge(cells)}")
    return "\n\n".join([*parts, *verdicts])


def quality_table(cells: Cells) -> str:
    """Rows attentions, columns peak rates."""
    rows = [["peak rate", *map(number, cells.rates())]]
    for name in cells.runs:
        line = []
        for rate in cells.rates():
            mean, bad = cells.mean(name, rate), cells.diverged(name, [rate])
            said = "" if mean is None else f"{mean.mean:.1f}{_plus(error(mean))} ({mean.count})"
            line.append(said + (f", {bad} diverged" if bad else ""))
        rows.append([name, *line])
    return markdown(rows)


def _plus(error: float | None, form: str = ".1f") -> str:
    return f" ± {error:{form}}" if error else ""


def against_own_best(cells: Cells) -> str:
    """Each row at softmax's best rate, at half and, where softmax itself bears it, at twice: shares of its own best.

    Softmax bears twice its best rate if it keeps SHARE of its own best there. A row is "open" where a rate is missing
    or has one run, and "within error" where it stays below SHARE by no more than the standard error of its share.
    """
    _, best = cells.best(BASELINE)
    rates = (best / 2, best, 2 * best)
    twice = cells.share(BASELINE, 2 * best)
    asked = rates if twice is not None and twice[0] >= SHARE else rates[:2]
    rows = [["", "its own best, at", *(f"share at {number(rate)}" for rate in rates), "diverged", f"≥ {SHARE}"]]
    for name in cells.runs:
        top, at = cells.best(name)
        shares = {rate: cells.share(name, rate) for rate in rates}
        said = ["" if found is None else f"{found[0]:.2f}{_plus(found[1], '.2f')}" for found in shares.values()]
        bad = cells.diverged(name, asked)
        kept, near = (
            all(found is not None and found[0] + errors * found[1] >= SHARE for found in map(shares.get, asked))
            for errors in (0, 1)
        )
        few = any(mean is None or mean.count < 2 for mean in (cells.mean(name, rate) for rate in asked))
        verdict = "no" if bad else "open" if few else "yes" if kept else "within error" if near else "no"
        rows.append([name, f"{top:.1f}, {number(at)}", *said, str(bad), "" if name == BASELINE else verdict])
    where = "half and at twice" if len(asked) == 3 else "half"
    asks = f"{SHARE} of its own best is asked of a row there, at {where} that rate."
    return f"softmax is best at {number(best)}. {asks}\n\n{markdown(rows)}"


def against_softmax(cells: Cells) -> str:
    """Each row beside softmax at the same rate: quality and gradient norms.

    In place of softmax a row has to reach SHARE of it, beside it no less than it within the difference's error.
    """
    heading = ["", "peak rate", "of softmax's", "minus softmax's", "gradient norm over softmax's", "reached"]
    rows = [heading]
    for name in cells.runs:
        for rate in [] if name == BASELINE else cells.rates():
            ours, theirs = cells.mean(name, rate), cells.mean(BASELINE, rate)
            if ours is None or theirs is None or theirs.mean == 0:
                continue
            share, gap = ours.mean / theirs.mean, difference(ours, theirs)
            spread = math.hypot(error(ours), share * error(theirs)) / theirs.mean
            norms = cells.norms(name, rate)
            reached = gap.difference >= -(gap.standard_error or 0.0) if BASELINE in name else share >= SHARE
            reached = reached and norms <= NORMS and not cells.diverged(name, [rate])
            verdict = "open" if min(ours.count, theirs.count) < 2 else "yes" if reached else "no"
            line = [f"{share:.2f}{_plus(spread, '.2f')}", f"{gap.difference:+.1f}{_plus(gap.standard_error)}"]
            rows.append([name, number(rate), *line, f"{norms:.1f}", verdict])
    asked = f"in place of softmax ≥ {SHARE} of it, beside it no lower within the error; norms ≤ {NORMS:.0f}"
    return f"{asked}\n\n{markdown(rows)}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A panel a task: quality over the peak rate, a line an attention, softmax thick and black."""
    shown = {task: cells for task in results["tasks"] if (cells := Cells.of(results, task)).runs}
    names = [name for name in results["attentions"] if name != BASELINE]
    colours = [*(colour for colour in COLOURS if colour != "#000000"), "#7F3C8D"]
    across = min(3, len(shown) + 1)
    with looks():
        figure = new_figure(2.6 * across, 2.5 * -(-(len(shown) + 1) // across))
        panels = figure.subplots(-(-(len(shown) + 1) // across), across, squeeze=False).ravel()
        handles: dict[str, Any] = {}
        style: dict[str, Any]
        for panel, (task, cells) in zip(panels, shown.items(), strict=False):
            for name, row in cells.runs.items():
                own, _, earlier = name.partition(",")
                index = names.index(own) if own in names else 0
                style = {"color": "black" if own == BASELINE else colours[index % len(colours)]}
                style["linewidth"] = 2.4 if own == BASELINE else 1.2
                style["linestyle"] = ":" if earlier else "-" if own == BASELINE else DASHES[index % len(DASHES)]
                means = [Mean.of([run["quality"] for run in runs]) for runs in row.values()]
                handles[name] = panel.errorbar(
                    list(row),
                    [mean.mean for mean in means],
                    yerr=[error(mean) for mean in means],
                    capsize=1.5,
                    elinewidth=0.7,
                    marker="o",
                    markersize=2.5,
                    **style,
                )
            panel.set_xscale("log")
            many = len(cells.rates()) > 4
            panel.set_xticks(cells.rates(), [number(rate) for rate in cells.rates()], fontsize=6 if many else None)
            panel.set_xticks([], minor=True)
            panel.set_ylim(bottom=0)
            finish(panel, task, "peak learning rate", METRICS[results["tasks"][task]["metric"]])
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        legend = {name: handles[name] for name in sorted(handles, key=[BASELINE, *names, *handles].index)}
        panels[len(shown)].legend(legend.values(), legend.keys(), loc="center", fontsize=7)
    save(figure, path)
