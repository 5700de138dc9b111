"""Studies of crossed factors: cells, rates chosen on held-out images, stages of seeds, effects over all cells."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karat import cli, runs
from karat.data.sources import ArraySource, set_aside
from karat.data.splits import Opener
from karat.errors import TrainingDiverged
from karat.runs import files
from karat.study import timing, work
from karat.study.commands import CompareSettings, _tried
from karat.study.document import parse_document
from karat.study.effects import Fit, effects, markdown
from karat.study.plan import Job, Plan, common_settings, make_plan
from karat.study.rows import VariantRow
from karat.study.statistics import Mean
from karat.study.trials import TRIALS, choose, settle, trial_plan, trials_of
from support.paths import ROOT

STUDY = """
[settings]
data = "digits"
recipe = "quick"
img_size = 8
patch_size = 4
embed_dim = 16
depth = 1
num_heads = 2
data_fraction = 0.1
batch_size = 16
epochs = 2
warmup_epochs = 1
track = []
device = "cpu"

[trials]
lr = [1e-3, 1e-2]
held_out = 300
together = ["width"]
epochs = 1

[factors.attention]
softmax = { attention = "softmax" }
static = { attention = "static-b,rank=2" }

[factors.width]
narrow = {}
wide = { embed_dim = 24 }

[[stages]]
seeds = 1

[[stages]]
seeds = 2
best = ["static, *"]
"""


def test_a_study_of_factors_from_its_trials_to_its_table(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    line = ["compare", "--study", str(tmp_path / "study.toml"), "--output", str(tmp_path / "out"), "--no-measure"]
    assert cli.main(line) == 0
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    tried, rows = found["trials"]["trials"], {row["name"]: row for row in found["rows"]}
    assert len(tried) == 8
    assert {row["planned"] for row in rows.values()} == {1, 2}
    for name, row in rows.items():
        means = {
            lr: np.mean([one["held_out"] for one in tried if one["lr"] == lr and one["variant"].startswith(name[:7])])
            for lr in (1e-3, 1e-2)
        }
        assert row["lr"] == max(means, key=lambda lr: means[lr])
        assert len(row["seeds"]) == row["planned"]
    held = {name: found["trials"]["chosen"][name]["held_out"] for name in rows if name.startswith("static")}
    assert rows[max(held, key=lambda name: held[name])]["planned"] == 2
    config = json.loads((tmp_path / "out" / "trials" / "softmax-narrow-lr=0.001-s100" / "config.json").read_text())
    assert (config["settings"]["held_out"], config["settings"]["recipe"]["lr"]) == (300, 1e-3)
    assert config["settings"]["recipe"]["epochs"] == found["trials"]["epochs"] == 1
    main_effects = [effect for effect in found["effects"] if not effect["within"]]
    assert [effect["level"] for effect in main_effects] == ["static", "wide"]
    assert cli.main([*line[:-1], "--only-table"]) == 0


def test_stages_say_in_which_order_runs_come(tmp_path: Path) -> None:
    document = parse_document(tomllib.loads(STUDY))
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    names = [variant.name for variant in plan.variants]
    assert names == ["softmax, narrow", "softmax, wide", "static, narrow", "static, wide"]
    assert document.trials is not None
    assert len(trial_plan(plan, document.trials).jobs()) == len(trials_of(plan, document.trials)) == 8
    first = trial_plan(plan, document.trials).jobs()[0].settings.recipe
    assert (first.epochs, first.warmup_epochs) == (1, 0.5)  # the warm-up in proportion
    assert choose(plan, document.trials) is None
    settled = settle(plan, {name: {"lr": 1e-3, "held_out": place} for place, name in enumerate(names)})
    order = [(job.variant, job.seed) for job in settled.jobs()]
    assert order == [*((name, 0) for name in names), ("static, wide", 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": [{"seeds": 2, "variants": ["nothing*"]}]}, "there is no variant 'nothing\\*'"),
        ({"stages": [{"seeds": 0}]}, "seeds=0"),
        ({"stages": [{"seeds": 2, "best": ["softmax*"]}]}, "add \\[trials\\]"),
        ({"stages": [{"seeds": 2}], "seeds": 2}, "leave seeds out"),
        ({"trials": {"lr": [1e-3]}}, "trials has no held_out"),
        ({"trials": {"lr": 1e-3, "held_out": 5}}, "give a list of rates"),
        ({"trials": {"lr": [1e-3], "held_out": 5, "together": ["depth"]}}, "there is no factor 'depth'"),
        ({"factors": {"a": {"x": {"attention": "softmax"}}, "b": {"y": {"attention": "g3b"}}}}, "another factor too"),
    ],
)
def test_what_a_design_cannot_be(change: dict[str, Any], said: str) -> None:
    study = {"variants": [{"attention": "softmax"}]} | change
    with pytest.raises(ValueError, match=said):
        parse_document(study)


def cell(levels: dict[str, str], values: dict[int, float]) -> VariantRow:
    curves = tuple((value,) for value in values.values())
    return VariantRow(
        ", ".join(levels.values()), "softmax", 1, tuple(values), len(values), "float32", Mean.of([*values.values()]),
        curves=curves, levels=levels,
    )  # fmt: skip


def test_effects_against_paired_differences() -> None:
    """Where every cell has the same seeds an effect is a mean of paired differences; with two cells, its t interval."""
    from scipy import stats

    ours, theirs = np.array([61.0, 64.0, 63.5]), np.array([60.0, 62.0, 61.0])
    rows = [
        cell({"attention": "softmax"}, dict(enumerate(theirs))),
        cell({"attention": "operator"}, dict(enumerate(ours))),
    ]
    (effect,) = effects(rows)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (effect.difference, effect.low, effect.high) == pytest.approx((np.mean(ours - theirs), *expected))
    assert effect.least_seen is not None
    assert effect.high is not None
    assert effect.least_seen > effect.high - effect.difference


def test_an_effect_is_the_mean_over_the_cells_of_the_other_factors() -> None:
    gains = {("usual", "faint"): 4.0, ("usual", "strong"): 2.0, ("mimetic", "faint"): 1.0, ("mimetic", "strong"): 1.0}
    rows = []
    for attention in ("softmax", "static"):
        for start, positions in gains:
            gain = gains[start, positions] if attention == "static" else 0.0
            values = {seed: 60 + gain + seed + 0.01 * (-1) ** (seed + len(rows)) for seed in range(2)}
            rows.append(cell({"attention": attention, "start": start, "positions": positions}, values))
    found = effects(rows)
    by_name = {(one.factor, *one.within.values()): one.difference for one in found}
    assert by_name["attention",] == pytest.approx(2.0, abs=0.05)
    assert by_name["start",] == pytest.approx(-1.0, abs=0.05)
    for within, gain in gains.items():
        assert by_name["attention", *within] == pytest.approx(gain, abs=0.05)
    assert Fit.of(rows).freedom == 16 - 8 - 1


def test_held_out_images_are_none_that_is_trained_on() -> None:
    source = ArraySource(np.arange(20, dtype=np.uint8).reshape(20, 1, 1), np.arange(20), "digits")
    train, held = set_aside(source, 5)
    assert (len(train), len(held)) == (15, 5)
    assert {*train.labels} | {*held.labels} == set(range(20))
    with pytest.raises(ValueError, match="held_out=20 of 20 training images: give 1 to 19"):
        set_aside(source, 20)


def test_the_frozen_study_has_thirty_cells_and_its_stages() -> None:
    document = parse_document(tomllib.loads((ROOT / "docs" / "studies" / "starts.toml").read_text()))
    assert len({tuple(entry.levels.values()) for entry in document.entries}) == len(document.entries) == 30
    assert [stage.seeds for stage in document.stages] == [2, 8, 4]
    assert document.trials is not None
    assert (len(document.trials.lr), document.trials.held_out) == (2, 5000)


UNUSABLE = {
    "[factors.attention]\n": "factors.attention is empty",
    '[factors.attention]\na = {attention = "softmax", name = "b"}\n': "leave name out",
    '[factors.attention]\na = {attention = "softmax", held_out = 9}\n': "common to all rows",
    "[trials]\nlr = [1e-3, 0.00100000001]\nheld_out = 9\n": "names one rate twice",
    "[trials]\nlr = [1e-3]\nheld_out = 9\nepochs = 0\n": "epochs",
    "[trials]\nlr = [1e-3]\nheld_out = 9\ntogether = [3]\n": "give a list of texts",
    '[trials]\nlr = [1e-3]\nheld_out = 9\ntogether = ["a"]\n': "there is no factor 'a'",
    '[trials]\nlr = [1e-3]\nheld_out = 9\n[[variants]]\nattention = "g1b"\nlr = 1e-2\n': "trials choose the rate",
    "[trials]\nlr = [1e-3]\nheld_out = 9\n[settings]\ncoefficient_lr = 1e-3\n": "give operator_lr_scale instead",
    '[[stages]]\nseeds = 1\n[[variants]]\nattention = "g1b"\nseeds = [3]\n': "stages say how many there are",
    "[stages]\nseeds = 1\n": "stages must be tables",
    "[[stages]]\nvariants = ['*']\n": "stage 1 has no seeds",
    **{f"[[stages]]\nseeds = 1\nvariants = {it}\n": "give a list of texts" for it in ("3", '"*"', "[]", "[3]", "[[]]")},
    **{f"stages = {it}\n": "stages must be tables" for it in ("3", '""', "[]", "true")},
}


@pytest.mark.parametrize("text", UNUSABLE)
def test_what_a_study_cannot_mean_is_refused_in_one_line(text: str) -> None:
    usual = "" if "[factors" in text else '[[variants]]\nattention = "softmax"\n'
    with pytest.raises(ValueError, match=UNUSABLE[text]):
        parse_document(tomllib.loads(text + usual))


def test_an_empty_table_of_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="factors is empty"):
        parse_document({"factors": {}})


def made(name: str, seeds: tuple[int, ...], values: list[float]) -> VariantRow:
    curves = tuple((value,) for value in values)
    return VariantRow(
        name, name, 1, seeds, len(seeds), "float32", Mean.of(values), curves=curves, levels={"kind": name}
    )


def test_cells_that_no_seed_ties_together_have_no_effect() -> None:
    rows = [made("a", (0, 1), [10.0, 11.0]), made("b", (2, 3), [20.0, 21.5]), made("c", (2, 3), [30.0, 31.0])]
    assert effects(rows) == []
    rows.append(made("d", (1, 2), [40.0, 41.0]))  # it ties them
    assert [effect.level for effect in effects(rows)] == ["b", "c", "d"]


def test_the_least_that_is_seen_has_the_power_that_is_said() -> None:
    random = np.random.default_rng(0)
    rows = [made("a", (0, 1, 2), [10.0, 11.0, 10.5]), made("b", (0, 1, 2), [10.4, 12.0, 10.2])]
    fit, (effect,) = Fit.of(rows), effects(rows)
    assert effect.high is not None
    assert effect.least_seen is not None
    assert fit.deviation is not None
    sure, shift = (number / fit.deviation for number in (effect.high - effect.difference, effect.least_seen))
    errors = random.normal(0, (2 / 3) ** 0.5, 100_000)
    scale = np.sqrt(random.chisquare(fit.freedom, 100_000) / fit.freedom)
    assert np.mean(shift + errors > sure * scale) == pytest.approx(0.8, abs=0.005)


def test_effects_are_a_table_whatever_levels_are_called() -> None:
    rows = [made("a|b", (0, 1), [10.0, 11.0]), made("c", (0, 1), [20.0, 21.5])]
    heading, rule, line = (re.split(r"(?<!\\)\|", text) for text in markdown(effects(rows)).splitlines())
    assert len(heading) == len(rule) == len(line) == 8


def done(plan: Plan, top1: float = 50.0) -> None:
    """Leave a finished run of every job."""
    for job in plan.jobs():
        runs.begin(job.folder, job.settings, {"num_classes": 10, "in_chans": 1})
        files.write_json(job.folder / runs.SUMMARY, {"finished": True, "top1": top1})


def test_trials_stay_the_same_when_step_times_give_epochs(tmp_path: Path) -> None:
    rows = [{"attention": "softmax", "name": "longer", "equal_time_to": "g3b"}, {"attention": "g3b"}]
    settings = {"data": "digits", "epochs": 4, "warmup_epochs": 1.2}
    document = parse_document({"settings": settings, "trials": {"lr": [1e-3], "held_out": 9}, "variants": rows})
    assert document.trials is not None
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    done(trial_plan(plan, document.trials))
    chosen = choose(plan, document.trials)
    assert chosen is not None
    timed = timing.settle(settle(plan, chosen), {"longer": {"float32": 0.1}, "g3b": {"float32": 0.2}})
    done(timed)
    again = make_plan(document, common_settings(document.settings), tmp_path)
    assert choose(again, document.trials) == chosen
    assert settle(again, chosen) == timed
    assert timed.variants[0].settings.recipe.epochs == 8
    other = make_plan(document, common_settings(settings | {"weight_decay": 0.3}), tmp_path)
    with pytest.raises(ValueError, match=r"remove that folder and \S+trials\.json"):
        choose(other, document.trials)


def test_a_diverged_trial_is_not_tried_again_while_another_process_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = STUDY[: STUDY.index("[factors.attention]")].replace('together = ["width"]\n', "")
    document = parse_document(tomllib.loads(text + '[[variants]]\nattention = "softmax"'))
    assert document.trials is not None
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    tried = trial_plan(plan, document.trials)
    trained: list[str] = []

    def diverge(job: Job, *_: Any) -> None:
        trained.append(job.folder.name)
        raise TrainingDiverged("it diverged")

    monkeypatch.setattr(work, "_train", diverge)
    monkeypatch.setattr("time.sleep", lambda _: done(replace(tried, variants=tried.variants[1:])))
    with work.claimed(tried.jobs()[1].folder):
        rates = _tried(plan, document.trials, CompareSettings(), Opener())
    assert rates == {"softmax": {"lr": 1e-2, "held_out": 50.0}}
    assert trained == [tried.jobs()[0].folder.name]


def test_a_row_whose_trials_all_diverge_has_no_rate_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, trained = work._train, list[str]()

    def diverge(job: Job, *rest: Any) -> None:
        trained.append(job.folder.name)
        if job.variant.startswith("static"):
            raise TrainingDiverged("it diverged")
        train(job, *rest)

    monkeypatch.setattr(work, "_train", diverge)
    text = STUDY.replace('together = ["width"]\n', "").replace("static, *", "static*")
    (tmp_path / "study.toml").write_text(re.sub(r"\[factors.width\].*?\n\n", "", text, flags=re.S))
    line = ["compare", "--study", str(tmp_path / "study.toml"), "--output", str(tmp_path / "out")]
    assert cli.main([*line, "--no-measure"]) == 1
    said = capsys.readouterr()
    assert "note: static has no rate and no runs, for all its trials diverged" in said.out
    assert said.err == "karat: training diverged: all trials of static\n"
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    rows, tried = {row["name"]: row for row in found["rows"]}, found["trials"]
    assert [(rows[name]["seeds"], rows[name]["planned"]) for name in ("softmax", "static")] == [([0], 1), ([], 0)]
    assert rows["softmax"]["lr"] == tried["chosen"]["softmax"]["lr"]
    assert rows["static"]["lr"] is None
    assert tried["chosen"].keys() == {"softmax"}
    assert [row["held_out"] for row in tried["trials"] if row["variant"] == "static"] == [None, None]
    assert len(trained) == 5
    assert cli.main([*line, "--no-measure", "softmax"]) == 0  # it has all that was asked for
    assert cli.main([*line, "--only-table"]) == 0
    assert len(trained) == 5


def test_rates_are_those_of_the_settings_that_they_were_chosen_under(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the trials' runs removed too; what earlier versions kept says no settings, and is read with a line."""
    settings = {"data": "digits", "epochs": 4}
    document = parse_document({
        "settings": settings,
        "trials": {"lr": [1e-3, 1e-2], "held_out": 9},
        "variants": [{"attention": "softmax"}, {"attention": "g3b", "depth": 2}],
    })  # fmt: skip
    asked = document.trials
    assert asked is not None

    def plan(**changes: Any) -> Plan:
        return make_plan(document, common_settings(settings | changes), tmp_path)

    tried = trial_plan(plan(), asked)
    for number, variant in enumerate(tried.variants):
        done(replace(tried, variants=(variant,)), 50.0 + number)
    rates = choose(plan(), asked)
    told = json.loads((tmp_path / TRIALS).read_text())
    earlier = {name: value for name, value in told.items() if name != "settings"}
    (tmp_path / TRIALS).write_text(json.dumps(earlier))
    assert choose(plan(), asked) == rates  # the runs say under which settings
    assert json.loads((tmp_path / TRIALS).read_text()) == told
    shutil.rmtree(tmp_path / "trials")
    assert choose(plan(), asked) == rates
    assert choose(plan(workers=2), replace(asked, lr=asked.lr[::-1])) == rates
    assert capsys.readouterr().out == ""
    for name, value in {"epochs": 5, "seed": 3, "weight_decay": 0.3, "data": "torch/cifar10"}.items():
        if name == "seed":  # trials have their own
            assert choose(plan(seed=value), asked) == rates
            continue
        with pytest.raises(ValueError, match=rf"{name} was \S+ and is now \S+; give another --output, or remove"):
            choose(plan(**{name: value}), asked)
    (tmp_path / TRIALS).write_text(json.dumps(earlier))
    assert choose(plan(), asked) == rates
    assert "it doesn't say under which settings" in capsys.readouterr().out
    assert json.loads((tmp_path / TRIALS).read_text()) == earlier  # these may not be its settings


def test_a_row_named_like_a_level_has_a_rate_of_its_own(tmp_path: Path) -> None:
    levels = {"attention": {"softmax": {"attention": "softmax"}}, "width": {"usual": {}, "wide": {"embed_dim": 96}}}
    document = parse_document({
        "settings": {"data": "digits"},
        "trials": {"lr": [1e-3, 1e-2], "held_out": 9, "together": ["width"]},
        "factors": levels,
        "variants": [{"name": "softmax", "attention": "softmax", "depth": 2}],
    })  # fmt: skip
    assert document.trials is not None
    plan = make_plan(document, common_settings(document.settings), tmp_path)
    tried = trial_plan(plan, document.trials)
    for number, variant in enumerate(tried.variants):
        # the row by itself learns more at the first rate, the cells at the second, by less
        done(replace(tried, variants=(variant,)), [60, 50, 50, 40, 51, 51][number])
    rates = choose(plan, document.trials)
    assert rates is not None
    assert {name: choice["lr"] for name, choice in rates.items()} == {
        "softmax": 1e-3, "softmax, usual": 1e-2, "softmax, wide": 1e-2,
    }  # fmt: skip


def test_trials_follow_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = tmp_path / "study.toml", tmp_path / "out"
    line = ["compare", "--study", str(study), "--output", str(out), "--no-measure"]
    text = STUDY[: STUDY.index("[factors.width]")].replace('together = ["width"]\nepochs = 1\n', "")
    study.write_text(text)
    assert cli.main([*line, "no such"]) == 2
    assert cli.main([*line, "--held-out", "9"]) == 2
    assert cli.main([*line, "--lr", "0.007"]) == 2
    assert "--lr 0.007: this study's trials choose the rate" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*line, "--seeds", "1", "softmax"]) == 0
    told = json.loads((out / "trials.json").read_text())
    study.write_text(text.replace("1e-2]", "1e-4]"))
    cli.main([*line, "softmax"])
    assert {row["lr"] for row in json.loads((out / "trials.json").read_text())["trials"]} == {1e-3, 1e-4}
    study.write_text(text)
    capsys.readouterr()
    assert cli.main([*line, "--epochs", "3"]) == 2
    assert "epochs was 2 and is now 3" in capsys.readouterr().err
    for broken in (
        {},
        [],
        told | {"trials": 3},
        told | {"chosen": {"softmax": {"lr": "x", "held_out": 1}}},
        told | {"settings": {}},
    ):
        (out / "trials.json").write_text(json.dumps(broken))
        assert cli.main([*line[:-1], "--only-table"]) == 2
        error = capsys.readouterr().err
        assert "remove it" in error
        assert error.count("\n") == 1
