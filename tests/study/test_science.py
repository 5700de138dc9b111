"""docs/science.md says what the results beside it hold: its tables cell by cell, and the numbers that it infers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import karat
from karat.study.statistics import difference
from support.paths import ROOT

RESULTS = ROOT / "docs" / "results" / "science"
PAGE = (ROOT / "docs" / "science.md").read_text(encoding="utf-8").splitlines()
DIM_96 = ("study.json", "study-float32.json")
OTHER_TABLES = ("timm's start", "Xavier's start", "sine-cosine positions")  # of rows that the first table leaves out
# What the page calls a row, where that isn't its name.
LABELS = {
    "softmax, as long as static beside it": "softmax, five epochs",
    "softmax, as long as G1B beside it": "softmax, six epochs",
    "beside softmax: one row, times 30": "beside softmax: one row, gate fixed at 30, weights from zero",
    "beside softmax: one row, at 30 times the rate": (
        "beside softmax: one row, its weights at 30 times the learning rate"
    ),
    "first half: G3B": "first half of the blocks: G3B",
    "instead of softmax: G3B, paper's initialisation": "instead of softmax: G3B, the paper's initialisation",
    "softmax, widened": "softmax, widened to {dim}",
    "sine-cosine positions: softmax": "softmax, sine-cosine positions",
    "sine-cosine positions: beside softmax, static, rank 12": "beside softmax: static, rank 12, sine-cosine positions",
    "sine-cosine positions: beside softmax, G1B, rank 24": "beside softmax: G1B, rank 24, sine-cosine positions",
}
STATIC, G1B, G3B = "beside softmax: static, rank 12", "beside softmax: G1B, rank 24", "beside softmax: G3B"


@pytest.fixture(scope="module")
def merge_studies() -> ModuleType:
    name = "benchmark_merge_studies"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "merge_studies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(*heading: str) -> list[list[str]]:
    """The cells below the page's one heading that begins with these."""
    (start,) = [n for n, line in enumerate(PAGE) if line.startswith("|") and cells(line)[: len(heading)] == [*heading]]
    return [cells(line) for line in takewhile(lambda line: line.startswith("|"), PAGE[start + 2 :])]


def states(number: str) -> bool:
    """Whether the page has this number, or "number ± error", somewhere, and not as a part of another."""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", " ".join(PAGE)) is not None


def runs_of(merge_studies: ModuleType, *names: str) -> dict[str, Any]:
    return {row.name: row for row in merge_studies.merged([RESULTS / name for name in names], "softmax")}


def label(name: str, dim: int) -> str:
    return LABELS.get(name, name).format(dim=dim)


def mean(row: Any) -> str:
    return f"{row.top1.mean:.2f}" + ("" if row.top1.deviation is None else f" ± {row.top1.deviation:.2f}")


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def pooled_deviation(rows: Iterable[Any]) -> float:
    """Of a run about the mean of its row, over all rows with several runs."""
    several = [row for row in rows if len(row.seeds) > 1]
    squares = sum(row.top1.deviation**2 * (len(row.seeds) - 1) for row in several)
    return (squares / sum(len(row.seeds) - 1 for row in several)) ** 0.5


def counted(row: Any) -> str:
    return f"{mean(row)} ({len(row.seeds)})"


def curve(row: Any) -> list[str]:
    """Top-1 after each epoch; the last one with its deviation."""
    return [*(f"{value:.2f}" for value in row.curve[:-1]), mean(row)]


def rows_of_the_first_table(merge_studies: ModuleType) -> dict[str, Any]:
    """By the page's names."""
    found = runs_of(merge_studies, *DIM_96).items()
    return {label(name, 102): row for name, row in found if not name.startswith(OTHER_TABLES)}


def last_of_the_trial(name: str) -> tuple[int, float]:
    """How far the first trial trained the row, its last epoch counted from 0, and that trial's softmax there."""
    return (2, 56.7) if "pointwise" in name else (3, 59.1)


def test_the_table_of_dim_96(merge_studies: ModuleType) -> None:
    expected = {}
    for name, row in rows_of_the_first_table(merge_studies).items():
        *first, fourth = curve(row)[:4]
        later = curve(row)[4:]
        fourth = f"{fourth}, then {', '.join(later)}" if later else fourth
        expected[name] = [str(len(row.seeds)), *first, fourth, f"{row.parameters / 1e3:,.0f}"]
    assert {name: cells for name, *cells in table("variant", "runs")} == expected


def test_the_first_trials_table(merge_studies: ModuleType) -> None:
    rows = rows_of_the_first_table(merge_studies)
    softmax, deviation = rows["softmax"], pooled_deviation(rows.values())
    page = table("variant", "first trial")
    assert page[0] == ["softmax", "59.1", "–", mean(softmax), "–", "–"]
    assert len(page) == 9
    for name, there, gain_there, *here in page[1:]:
        row = rows[name]
        epoch, softmax_there = last_of_the_trial(name)
        gains = float(there) - softmax_there, row.curve[epoch] - softmax.curve[epoch]
        error = deviation * (2 + 1 / len(row.seeds) + 1 / len(softmax.seeds)) ** 0.5  # of four numbers, two single runs
        assert gain_there == signed(gains[0]), name
        top1 = f"{row.curve[epoch]:.2f}" if epoch == 2 else mean(row)
        assert here == [top1, signed(gains[1]), f"{signed(gains[1] - gains[0])} ± {error:.1f}"], name


def test_the_first_trial_taken_together(merge_studies: ModuleType) -> None:
    rows = rows_of_the_first_table(merge_studies)
    softmax, page = rows["softmax"], table("variant", "first trial")[1:]
    differences, counts = [], []
    for name, there, *_ in page:
        epoch, softmax_there = last_of_the_trial(name)
        here = rows[name].curve[epoch] - softmax.curve[epoch]
        differences.append(here - (float(there) - softmax_there))
        counts.append(len(rows[name].seeds))
    # In units of a run's variance: each row's own runs, and the two softmaxes that all rows share.
    covariance = np.diag(1 + 1 / np.array(counts)) + 1 + 1 / len(softmax.seeds)
    d, freedom = np.array(differences), sum(len(row.seeds) - 1 for row in rows.values())
    deviation = pooled_deviation(rows.values())
    f = d @ np.linalg.solve(covariance, d) / len(d) / deviation**2
    p = stats.f.sf(f, len(d), freedom)
    assert states(f"F = {f:.1f}")
    assert states(f"p = {p:.2f}")
    errors = np.abs(d) / deviation / np.diag(covariance) ** 0.5
    assert ((errors < 2).sum(), len(d)) == (7, 8)
    assert states(f"{errors.max():.1f}")


def test_the_highest_operator_against_static_mixing(merge_studies: ModuleType) -> None:
    rows = rows_of_the_first_table(merge_studies)
    static, operator = rows["beside softmax: static, rank 36"], rows[f"{G1B}, and the query's place"]
    several = [row for name, row in rows.items() if "G" in name and len(row.seeds) > 1]
    assert max(several, key=lambda row: row.top1.mean) is operator
    gap, equal = (difference(row.top1, static.top1) for row in (operator, rows[G1B]))
    assert states(mean(operator))
    assert states(f"{gap.difference:.1f} ± {gap.standard_error:.1f}")
    assert states(f"{gap.deviations:.1f} deviations")
    assert states(f"± {pooled_deviation(rows.values()) * (2 / 3) ** 0.5:.1f}")
    assert states(f"{abs(equal.difference):.1f} ± {equal.standard_error:.1f}")
    for row in (operator, static):
        later = fmean(curve[-1] for seed, curve in zip(row.seeds, row.curves, strict=True) if seed)
        assert states(f"{later:.1f}")


def test_the_first_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers above the first section; its table is generated."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    study = importlib.import_module("starts_answer").read()
    screen = " ".join(line.strip() for line in takewhile(lambda line: not line.startswith("## "), PAGE))
    found = Anova(study["rows"])
    beside, static, place, both = "operator beside it", "static beside it", "operator in place", "operator and static"

    def over(level: str, *cells: str) -> str:
        pairs = [(f"{level}, {cell}", f"softmax, {cell}") for cell in cells]
        gain, error = found.contrast(pairs)
        assert error is not None
        half = float(stats.t.ppf(0.975, found.freedom)) * error
        return f"{gain:.1f} ({gain - half:.1f} to {gain + half:.1f})".replace("-", "−")

    usual, started = (
        "usual, faint",
        [f"{start}, {at}" for start in ("mimetic", "impulse") for at in ("faint", "strong")],
    )
    points = over(beside, usual).replace(" (", " points (")
    assert f"The operator gains {points}. Static mixing gains {over(static, usual)[:3]}. Over eight seeds" in screen
    assert f"the operator gains +{over(beside, 'usual, strong').replace('to ', 'to +')}." in screen
    assert f"ends +{over(beside, *started).replace(' (', ' points (').replace('to ', 'to +')} from softmax." in screen
    assert f"Static mixing gains {over(static, *started)}." in screen
    assert f"it gains {over(place, usual).replace(' (', ' points (')} with the usual start" in screen
    strong = [cell for cell in started if cell.endswith("strong")]
    gain, error = found.contrast([(f"{place}, {cell}", f"softmax, {cell}") for cell in strong])
    assert error is not None
    half = float(stats.t.ppf(0.975, found.freedom)) * error
    assert f"it loses {-gain:.1f} ({-gain - half:.1f} to {-gain + half:.1f}), with faint ones nothing seen." in screen
    gain, error = found.contrast([(f"{place}, {cell}", f"softmax, {cell}") for cell in {*started} - {*strong}])
    assert error is not None
    assert abs(gain) < error
    main = {effect["level"]: effect for effect in study["effects"] if not effect["within"]}
    runs = sum(len(row["seeds"]) for row in study["rows"])
    assert f"{runs} of the {sum(row['planned'] for row in study['rows'])} runs" in screen
    least = max(main[level]["least_seen"] for level in (beside, static, place, both))
    in_one_cell = max(effect["least_seen"] for effect in study["effects"] if len(effect["within"]) == 2)
    assert f"differences of {least:.1f} points would be seen there, and of {in_one_cell:.1f} in one cell." in screen
    means = {row["name"]: row["top1"]["mean"] for row in study["rows"]}
    fitted = [
        abs(effect["difference"] - means[", ".join([effect["level"], cell])] + means[f"softmax, {cell}"])
        for effect in study["effects"]
        for cell in [", ".join(effect["within"].values())]
        if len(effect["within"]) == 2
    ]
    assert f"they may differ from the table's by {max(fitted):.1f} or so." in screen
    answer = importlib.import_module("starts_answer")
    below, named = (answer.paired(*answer.DECIDING[pair]) for pair in (0, 2))
    assert "ends {:.1f} points ({:.1f} to {:.1f}) below it.".format(*(-below[n] for n in (0, 2, 1))) in screen
    assert "Both together gain {} ({} to {}) in the pair".format(*map(signed, named[:3])) in screen
    ours, theirs = (answer.paired(*pair) for pair in answer.AFTERWARDS)
    assert "softmax ends {:.1f} points ({:.1f} to {:.1f}) below that operator.".format(*ours[:3]) in screen
    assert f"It ends {theirs[0]:.1f} below static mixing." in screen
    assert {below[3], named[3], ours[3], theirs[3]} == {8}
    assert "over eight seeds" in screen.lower()
    means = {row["name"]: row["top1"]["mean"] for row in study["rows"]}
    advised = means["softmax, mimetic, strong"] - means["softmax, usual, faint"]
    assert f"There it gained {advised:.1f} points, at dim 96" in " ".join(line.strip() for line in PAGE)
    band = of_the_band("softmax", "operator G3, rank 12")
    assert (
        "softmax explains {:.0f} % and an operator of three frequencies {:.0f} ± {:.0f}, over".format(
            *map(fmean, band), stdev(band[1])
        )
        in screen
    )


def of_the_band(*rows: str) -> list[list[float]]:
    """What each seed explains of the band at the first size, in percent."""
    runs = json.loads((RESULTS / "score_tasks.json").read_text(encoding="utf-8"))["runs"]
    band = [run for run in runs if (run["task"], run["size"]) == ("band", [16, 16]) and run["seed"] < 5]
    return [[100 * run["explained"] for run in band if run["row"] == row] for row in rows]


def test_the_gains_at_dim_96(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("science_answer")
    page = " ".join(line.strip() for line in PAGE)
    rows, wide = answer.runs_of(96), answer.runs_of(192)
    apart = answer.gain(rows, G1B, answer.STATIC_36)
    assert f"within {max(abs(apart.gain - apart.half), abs(apart.gain + apart.half)):.1f} points" in page
    assert f"differences of {answer.smallest(rows, 3):.1f} points" in page
    gains = [answer.gain(wide, name, "softmax").gain for name in ("sine-cosine positions: softmax", STATIC)]
    assert "softmax alone gains {:.1f} of static mixing's {:.1f} points".format(*gains) in page


def test_gains_and_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("science_answer")
    rows = {"softmax": {0: 1.0, 1: 3.0}, "ours": {0: 2.0, 1: 6.0}}
    deviation, freedom = answer.scatter(rows)
    assert (deviation**2, freedom) == (pytest.approx((2 + 8) / 2), 2)  # squares about the means, one degree each
    found = answer.gain(rows, "ours", "softmax")
    assert (found.gain, found.runs) == (2.0, 2)
    assert found.half == pytest.approx(4.3027 * 5**0.5, rel=1e-4)  # Student's quantile for two degrees
    assert answer.smallest(rows, 2) == pytest.approx(2.8016 * 5**0.5, rel=1e-4)
    rows["softmax"][5] = 50.0  # a seed that only one row has
    assert answer.gain(rows, "ours", "softmax").gain == 2.0


def test_the_table_of_positions(merge_studies: ModuleType) -> None:
    strong = ["sine-cosine positions: " + name for name in ("softmax", *(n.replace(":", ",") for n in (STATIC, G1B)))]
    expected = []
    for dim, name in ((96, "study-float32.json"), (192, "study-192.json")):
        rows = runs_of(merge_studies, name)
        for kind, names in (("timm's, deviation 0.02", ("softmax", STATIC, G1B)), ("sines and cosines", strong)):
            expected.append([str(dim), kind, *(counted(rows[n]) if n in rows else "–" for n in names)])
    assert table("dim", "position embeddings") == expected


def test_the_table_of_starts(merge_studies: ModuleType) -> None:
    rows = runs_of(merge_studies, *DIM_96)
    columns = ("softmax", G3B, STATIC, "beside softmax: one row")
    for start, *cells in table("start"):
        for name, cell in zip(columns, cells, strict=True):
            if start == "torch's" and name.endswith("one row"):
                fast = rows["beside softmax: one row, at 30 times the rate"]
                assert cell == f"{counted(rows[name])}, {mean(fast)} at 30 times the rate ({len(fast.seeds)})"
                continue
            row = rows.get(name if start == "torch's" else f"{start} start: {name.replace(':', ',')}")
            assert cell == ("–" if row is None else counted(row)), (start, name)


def test_the_table_of_larger_models(merge_studies: ModuleType) -> None:
    expected = []
    for dim in (192, 384):
        for place, (name, row) in enumerate(runs_of(merge_studies, f"study-{dim}.json").items()):
            cells = [*curve(row), *[""] * (5 - len(row.curve))]
            expected.append(["" if place else str(dim), label(name, 198), str(len(row.seeds)), *cells])
    assert sorted(table("dim", "variant")) == sorted(expected)


def test_the_table_of_measures() -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "study-float32.json").read_text())["rows"]}
    digits = {"largest_eigenvalue": 0, "loss_rise": 3, "map_faithfulness": 3, "map_entropy": 3}
    page = table("variant", "curvature")
    assert len(page) == 5
    for name, *cells in page:
        measures = {key: rows[name]["measures"][key] for key in digits}
        assert cells == [
            f"{m['mean']:.{n}f}" + ("" if m["deviation"] is None else f" ± {m['deviation']:.{n}f}")
            for m, n in zip(measures.values(), digits.values(), strict=True)
        ], name


def test_seeds_of_several_files_are_one_row(tmp_path: Path, merge_studies: ModuleType) -> None:
    def study(name: str, seeds: list[int], curves: list[list[float]], title: str = "a study", epochs: int = 2) -> Path:
        row = {"name": "softmax", "attention": "softmax", "epochs": epochs, "seeds": seeds, "curves": curves}
        empty = row | {"name": "waits", "seeds": [], "curves": []}
        rows = [row | {"amp_dtype": "float32", "parameters": 5}, empty]
        path = tmp_path / name
        path.write_text(json.dumps({"title": title, "rows": rows}))
        return path

    first, second = study("a", [0, 1], [[1.0, 2.0], [2.0, 4.0]]), study("b", [2], [[3.0, 6.0]])
    (row,) = merge_studies.merged([first, second], "softmax")
    assert (row.seeds, row.curve) == ((0, 1, 2), (2.0, 4.0))
    assert (row.top1.mean, row.top1.deviation, row.top1.count) == (4.0, 2.0, 3)
    with pytest.raises(ValueError, match="has a seed twice"):
        merge_studies.merged([first, first], "softmax")
    with pytest.raises(ValueError, match="no run of 'waits'"):
        merge_studies.merged([first], "waits")
    with pytest.raises(ValueError, match="different studies"):
        merge_studies.merged([first, study("c", [2], [[3.0, 6.0]], title="another")], "softmax")
    with pytest.raises(ValueError, match="one row has one setting"):
        merge_studies.merged([first, study("d", [2], [[3.0, 6.0, 7.0]], epochs=3)], "softmax")


def test_the_run_that_stands_out_and_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    rows = importlib.import_module("starts_answer").read()["rows"]
    last = {row["name"]: sorted(curve[-1] for curve in row["curves"]) for row in rows}
    low, high = last["operator in place, impulse, strong"]
    page = " ".join(line.strip() for line in PAGE)
    assert f"ended at {low:.1f} %. The other seed ended at {high:.1f} %." in page
    others = [runs[-1] - runs[0] for name, runs in last.items() if name != "operator in place, impulse, strong"]
    assert high - low > 2 * max(others)
    assert f"{sum(min(len(runs), 4) for runs in last.values())} of {4 * len(last)} runs are there" in page


def test_scores_spread_by_the_start() -> None:
    """As the page says, before any training: impulse, mimetic and usual weights with strong positions."""
    found = []
    for start in ("attn_init=impulse,", "attn_init=mimetic,", ""):
        deviations = []
        for seed in range(4):
            torch.manual_seed(seed)
            name = f"vit_tiny_patch16_224({start}pos_embed=sincos,weight_init=reset)"
            sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
            model = karat.create_model(name, "g1b,rank=24", num_classes=10, **sizes).eval()
            with torch.no_grad(), karat.record(model) as seen:
                model(torch.randn(8, 3, 32, 32))
            deviations.append(float(torch.stack([block.scores for block in seen.values()]).std()))
        found.append(fmean(deviations))
    page = " ".join(line.strip() for line in PAGE)
    impulse, mimetic, usual = (f"{deviation:.1f}" for deviation in found)
    assert f"scores have a deviation of {impulse} there, on random images, in the mean of four starts." in page
    assert f"With mimetic weights and such positions it is {mimetic}, with the usual start {usual} (" in page


def test_the_pairs_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their intervals are those of paired t-tests; they are the pairs that have most runs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("starts_answer")
    rows = {row["name"]: row for row in answer.read()["rows"]}
    page = table("of one seed each")
    assert page == [[str(cell) for cell in line] for line in answer.deciding()]
    for (ours, theirs), (_, place, points, interval, seeds) in zip(
        answer.DECIDING + answer.AFTERWARDS, page, strict=True
    ):
        both = [
            [curve[-1] for seed, curve in zip(rows[name]["seeds"], rows[name]["curves"], strict=True) if seed in shared]
            for shared in [{*rows[ours]["seeds"]} & {*rows[theirs]["seeds"]}]
            for name in (ours, theirs)
        ]
        test = stats.ttest_rel(*both)
        sure = test.confidence_interval()
        assert (points, interval) == (f"{np.subtract(*both).mean():+.2f}", f"{sure.low:+.2f} to {sure.high:+.2f}")
        assert len(both[0]) == int(seeds) == rows[ours]["planned"] == max(row["planned"] for row in rows.values())
        named = [name.split(", ", 1)[1] for name in (ours, theirs)]
        assert place == (named[0] if (ours, theirs) in answer.DECIDING else " − ".join(named))
        assert (ours, theirs) in answer.AFTERWARDS or named[0] == named[1]


def test_the_study_of_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are those of its runs, and its effects those of least squares set up anew."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("starts_answer")
    rows = answer.read()["rows"]
    heads, lines = answer.means()
    assert table("top-1 % (runs)", *heads) == lines
    found = {row["name"]: [curve[-1] for curve in row["curves"]] for row in rows}
    for name, *page in lines:
        for head, cell in zip(heads, page, strict=True):
            runs = found[f"{name}, {head}"]
            assert cell == (f"{fmean(runs):.1f} ({len(runs)})" if runs else "–")
    effects = {line[0]: line[2] for line in table("level − level", "within")}
    main = {effect["level"]: effect for effect in answer.read()["effects"] if not effect["within"]}
    for level, words in (
        ("static beside it", "static mixing beside softmax"),
        ("operator beside it", "The operator beside softmax"),
    ):
        sure = " to ".join(signed(main[level][end]) for end in ("low", "high"))
        assert f"{words} gains {signed(main[level]['difference'])} ({sure})" in " ".join(PAGE)
    # top-1 = cell + seed, by orthogonal projection: seeds' means over cells taken out of both sides
    runs = [
        (row["name"], seed, value) for row in rows for seed, value in zip(row["seeds"], found[row["name"]], strict=True)
    ]
    names, seeds = (list(dict.fromkeys(run[place] for run in runs)) for place in (0, 1))
    cell = np.array([[run[0] == name for name in names] for run in runs], float)
    seed = np.array([[run[1] == one for one in seeds] for run in runs], float)
    kept = np.eye(len(runs)) - seed @ np.linalg.pinv(seed)
    means, *_ = np.linalg.lstsq(kept @ cell, kept @ np.array([run[2] for run in runs]), rcond=None)
    levels = {row["name"]: row["levels"] for row in rows}
    for factor in ("attention", "start", "positions"):
        of = {
            level: fmean(value for name, value in zip(names, means, strict=True) if levels[name][factor] == level)
            for level in dict.fromkeys(one[factor] for one in levels.values())
        }
        first, *others = of
        for level in others:
            assert float(effects[f"{level} − {first}"]) == pytest.approx(of[level] - of[first], abs=0.00501)


class Anova:
    """top-1 = cell + seed + noise, by normal equations of the runs of these rows."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        runs = [(row["name"], *run) for row in rows for run in zip(row["seeds"], row["curves"], strict=True)]
        self.cells = list(dict.fromkeys(name for name, _, _ in runs))
        seeds = list(dict.fromkeys(seed for _, seed, _ in runs))[1:]
        design = np.array(
            [[name == c for c in self.cells] + [seed == s for s in seeds] for name, seed, _ in runs], float
        )
        values = np.array([curve[-1] for _, _, curve in runs])
        self.inverse = np.linalg.inv(design.T @ design)
        self.means = self.inverse @ design.T @ values
        self.freedom = len(runs) - design.shape[1]
        self.variance = float(((values - design @ self.means) ** 2).sum()) / max(self.freedom, 1)

    def gap(self, ours: str, theirs: str) -> tuple[float, float | None]:
        """One cell minus another, and its standard error; None where no two runs tell how far runs scatter."""
        return self.contrast([(ours, theirs)])

    def contrast(self, pairs: Iterable[tuple[str, str]]) -> tuple[float, float | None]:
        """The mean of such differences."""
        mine, others = ([self.cells.index(name) for name in names] for names in zip(*pairs, strict=True))
        weights = np.bincount(mine, minlength=len(self.means)) - np.bincount(others, minlength=len(self.means))
        weights = weights / len(mine)
        error = float(self.variance * (weights @ self.inverse @ weights)) ** 0.5 if self.freedom else None
        return float(weights @ self.means), error


def with_interval(gain: float, error: float | None, freedom: int) -> str:
    """As the tables have it."""
    half = 0.0 if error is None else float(stats.t.ppf(0.975, freedom)) * error
    return signed(gain) + ("" if error is None else f" ({signed(gain - half)} to {signed(gain + half)})")


def with_rivals(rows: list[dict[str, Any]], rivals: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """The rows of a study, then the finished rows of that size with softmax's best start."""
    names = {row["name"]: row["name"].removesuffix(f", {size}") for row in rivals if row["name"].endswith(f", {size}")}
    finished = [row for row in rivals if row["name"] in names and row["seeds"]]
    return [*rows, *(row | {"name": f"{names[row['name']]}, mimetic, strong"} for row in finished)]


def test_the_table_of_wider_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are those of an analysis of variance, and the page's sentences have them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("longer_answer")
    rows = answer.read("starts-width")["rows"]
    found, beside = Anova(rows), with_rivals(rows, answer.read("starts-rivals")["rows"], "dim 96")
    both = Anova(beside)
    page = {name: line for name, *line in table("dim 96, depth 6, four epochs")}
    assert list(page) == [row["name"] for row in beside]
    for row in beside:
        fit = found if row in rows else both
        runs = [curve[-1] for curve in row["curves"]]
        top1, over, least, count = page[row["name"]]
        assert (top1.split(" ± ")[0], count) == (f"{fmean(runs):.1f}", str(len(runs)))
        assert top1.split(" ± ")[1:] == [f"{stdev(some):.1f}" for some in [runs] if len(some) > 1]
        if row["name"] != "softmax":
            gain, error = fit.gap(row["name"], "softmax")
            assert error is not None
            assert over == with_interval(gain, error, fit.freedom)
            power = stats.nct.sf(stats.t.ppf(0.975, fit.freedom), fit.freedom, float(least) / error)
            assert power == pytest.approx(0.8, abs=0.05)  # of a number with one digit
    words = " ".join(line.strip() for line in PAGE)
    gaps = {name: found.gap(name, "softmax")[0] for name in found.cells[1:]}
    assert f"all three gain {min(gaps.values()):.1f} to {max(gaps.values()):.1f} points over softmax" in words
    gain, error = found.gap("operator in place", "softmax")
    assert error is not None
    half = float(stats.t.ppf(0.975, found.freedom)) * error
    assert f"gains {gain:.1f} points ({gain - half:.1f} to {gain + half:.1f}). Static" in words
    assert f"Static mixing gains {gaps['static beside it']:.1f}." in words
    apart = with_interval(*found.gap("operator in place", "static beside it"), found.freedom).replace(" (", " points (")
    assert f"the operator ends {apart} from static mixing." in words
    rival = "softmax, mimetic, strong"
    over = with_interval(*both.gap(rival, "softmax"), both.freedom).removeprefix("+").replace("+", "")
    assert f"softmax gains {over.replace(' (', ' points (')}." in words
    static, place = (
        with_interval(*both.gap(name, rival), both.freedom) for name in ("static beside it", "operator in place")
    )
    assert f"static mixing ends {static} above that. The operator in softmax's place ends {place} above it." in words
    gap = with_interval(*both.gap("static beside it, mimetic, strong", rival), both.freedom)
    assert f"adds nothing that was seen: it ends {gap.replace(' (', ' points (')} from softmax." in words
    assert f"at dim 96 {both.gap(rival, 'softmax')[0]:.1f}." in words
    above = [f"{both.gap(name, rival)[0]:.1f}" for name in ("static beside it", "operator in place")]
    assert "softmax ends {} to {} below them,".format(*above) in words


def test_the_table_of_longer_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crossed cells by an analysis of variance; single runs of longer training scatter as those do."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("longer_answer")
    rows = answer.read("starts-horizon")["rows"]
    crossed = [row for row in rows if row["levels"]]
    found, last = Anova(crossed), {row["name"]: row["curves"] for row in rows}
    lines = {name: line for name, *line in table("dim 64, depth 4, top-1 % (runs)")}
    beside = with_rivals(crossed, answer.read("starts-rivals")["rows"], "12 epochs")
    both = Anova(beside)
    for row in beside[len(crossed) :]:
        runs, gap = [curve[-1] for curve in row["curves"]], both.gap(row["name"], "softmax, 12 epochs")
        shown = ["–", f"{fmean(runs):.1f} ({len(runs)})", "–", "", with_interval(*gap, both.freedom), ""]
        assert lines.pop(row["name"]) == shown
        words = shown[-2].replace(" (", " points (")
        page = " ".join(line.strip() for line in PAGE)
        assert f"softmax ends {words} from the usual start, at the rate" in page
        assert f"In twelve epochs it lost {-gap[0]:.1f}." in page
    assert list(lines) == list(answer.ATTENTIONS)
    for name, cells in lines.items():
        for epochs, top1, over in zip(answer.HORIZONS, cells[:3], cells[3:], strict=True):
            ours, softmax = f"{name}, {epochs} epochs", f"softmax, {epochs} epochs"
            runs, base = ([curve[-1] for curve in last.get(one, [])] for one in (ours, softmax))
            assert top1 == (f"{fmean(runs):.1f} ({len(runs)})" if runs else "–")
            if name == "softmax" or not runs or not base:
                assert over == ""
            elif ours in found.cells:
                assert over == with_interval(*found.gap(ours, softmax), found.freedom)
            else:
                (mine,), (theirs,) = runs, base
                error = (2 * found.variance) ** 0.5 if found.freedom else None
                assert over == with_interval(mine - theirs, error, found.freedom)


def test_longer_training_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    answer = importlib.import_module("longer_answer")
    words = " ".join(line.strip() for line in PAGE)
    gains = {key: f"{gain:.1f}" for key, (gain, _) in answer.gains().items()}
    static, place = ([gains[name, epochs] for epochs in (4, 12)] for name in ("static beside it", "operator in place"))
    assert "static mixing gains {} points after four epochs and {} after twelve.".format(*static) in words
    assert "in softmax's place gains {}, then {}.".format(*place) in words
    beside = {epochs: gain for (name, epochs), gain in answer.gains().items() if name == "operator beside it"}
    assert f"At dim 64 the operator gains {beside[4][0]:.1f} points after four epochs." in words
    low, high = beside[12][0] - beside[12][1], beside[12][0] + beside[12][1]
    assert f"After twelve it gains {beside[12][0]:.1f} ({low:.1f} to {high:.1f})." in words
    assert "After 36, in one run each, nothing is seen." in words
    assert "on seven degrees of freedom." in words
    assert Anova(row for row in answer.read("starts-horizon")["rows"] if row["levels"]).freedom == 7
    unsure = {(name, epochs) for (name, epochs), (gain, half) in answer.gains().items() if gain < half}
    assert unsure == {("operator in place", 12), ("operator beside it", 36)}
    assert {(run["images"], run["split"]) for run in answer.read("averaging").values()} == {(2000, "eval")}
    ends = {
        (name, epochs): [lines[-1]["lost"] for lines in runs if lines[-1]["epoch"] == epochs]
        for name, runs in answer.lost().items()
        for epochs in (12, 36)
    }
    costs = {name: fmean(lost) for (name, epochs), lost in ends.items() if epochs == 12}
    assert {len(lost) for (_, epochs), lost in ends.items() if epochs == 12} == {2}
    assert f"that costs softmax {costs['softmax']:.0f} points, static mixing beside softmax" in words
    last = [*ends["softmax", 36], *ends["operator beside it", 36]]
    assert "After 36 epochs softmax loses {:.0f} points and the operator beside it {:.0f}.".format(*last) in words
    assert (
        f"beside softmax {costs['static beside it']:.1f}, the operator in its place {costs['operator in place']:.1f}."
        in words
    )
    assert f"The operator beside softmax loses {costs['operator beside it']:.1f}." in words
    seeds = {row["name"]: len(row["seeds"]) for row in answer.read("starts-horizon")["rows"] if row["levels"]}
    assert {*seeds.values()} == {2}
    assert "Four and twelve epochs have two seeds each, 36 one." in words
