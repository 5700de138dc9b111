"""`coefficient_lr`, a rate of the operators' own, is now a factor of everybody's; what was begun under it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from karat import cli, runs
from karat.detect.settings import DetectSettings
from karat.runs import files
from karat.runs.classification import Settings
from karat.runs.recipes import RECIPES
from karat.runs.renamed import renamed_options
from karat.study.document import parse_document
from karat.study.plan import Plan, common_settings, make_plan
from karat.train.classify import Classification, train
from karat.train.commands import defaults, read_settings
from support.interrupted import CutOff, Doomed
from support.training import NOISY, options, outcome, tiny

OLD_RATE, LR = 7e-4, 3e-3  # of which the ratio is no short number


def as_before(run: Path, rate: float | None) -> None:
    """Write a run's config.json as it was written under the old name."""
    config = files.read_json(run / runs.CONFIG)
    recipe = config["settings"]["recipe"]
    del recipe["operator_lr_scale"]
    files.write_json(run / runs.CONFIG, config | {"settings": config["settings"] | {"recipe": recipe}})
    recipe["coefficient_lr"] = rate
    (run / runs.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("kind", [Settings, DetectSettings])
@pytest.mark.parametrize(("rate", "scale"), [(None, 1.0), (OLD_RATE, OLD_RATE / LR)])
def test_saved_settings_have_the_ratio_that_they_meant(kind: Any, rate: float | None, scale: float) -> None:
    plain = kind.make(lr=LR).as_dict()
    del plain["recipe"]["operator_lr_scale"]
    plain["recipe"]["coefficient_lr"] = rate
    assert kind.from_dict(plain).recipe.operator_lr_scale == scale
    assert kind.from_dict(kind.make(lr=LR, coefficient_lr=rate).as_dict()).recipe.operator_lr_scale == scale
    plain["recipe"]["operator_lr_scale"] = 1.0
    with pytest.raises(ValueError, match="both are given"):
        kind.from_dict(plain)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"operator_lr_scale="):
        RECIPES["quick"].override(operator_lr_scale=scale)


def test_a_run_begun_under_the_old_name_resumes_bit_equal(tmp_path: Path) -> None:
    values = {"attention": "g3b", "lr": LR, "epochs": 2, "recovery_interval": 3, **NOISY}
    train(tiny(tmp_path / "whole", operator_lr_scale=OLD_RATE / LR, **values))
    doomed = Doomed(Classification(), tiny(tmp_path / "run", coefficient_lr=OLD_RATE, **values))
    doomed.lives = 5
    with pytest.raises(CutOff):
        doomed.fit()
    as_before(tmp_path / "run", OLD_RATE)
    train(tiny(tmp_path / "run", coefficient_lr=OLD_RATE, resume="auto", **values))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_command_that_began_a_run_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = options(tmp_path / "run", attention="g3b", lr=LR, coefficient_lr=OLD_RATE, epochs=1, resume="auto")
    assert cli.main(["train", *line]) == 0
    as_before(tmp_path / "run", OLD_RATE)
    assert cli.main(["train", *line]) == 0
    said = capsys.readouterr().out
    assert said.count("note: --coefficient-lr is now --operator-lr-scale: 0.0007 is 0.233333 of lr 0.003") == 2


@pytest.mark.parametrize(
    ("line", "scale"),
    [
        (["--coefficient-lr", "5e-05", "--lr", "1e-3"], 0.05),
        (["--lr=1e-3", "--coefficient_lr=5e-05"], 5e-5 / 1e-3),
        (["--recipe", "quick", "--coefficient-lr", "8e-3"], 2.0),
        (["--recipe", "finetune", "--coefficient-lr", "None"], 1.0),
        (["--recipe", "finetune", "--lr", "3e-4"], 5.0),
    ],
)
def test_the_old_option_is_a_multiple_of_the_rate_of_the_run(
    line: list[str], scale: float, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_settings(Settings, line, "karat train", defaults(line))
    assert settings.recipe.operator_lr_scale == scale
    assert ("note: --coefficient-lr" in capsys.readouterr().out) == any("coefficient" in word for word in line)


def test_a_line_without_the_old_option_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["softmax", "g3b", "--lr", "1e-3", "--track", "tensorboard"]
    assert renamed_options(line, 1.0) == line
    assert renamed_options([*line, "--coefficient-lr", "2e-3"], 1.0) == [*line, "--operator-lr-scale", "2.0"]
    assert capsys.readouterr().out == "note: --coefficient-lr is now --operator-lr-scale: 2e-3 is 2 of lr 0.001\n"


@pytest.mark.parametrize("command", [["train"], ["compare"], ["detect", "train"]])
@pytest.mark.parametrize(("value", "said"), [(["much"], "--operator-lr-scale"), ([], "expected one argument")])
def test_commands_translate_it_and_refuse_what_is_no_rate(
    command: list[str], value: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--coefficient-lr", *value]) == 2
    assert said in capsys.readouterr().err


def plan_of(tmp_path: Path, settings: dict[str, Any], **row: Any) -> Plan:
    document = parse_document({"settings": settings, "variants": [{"attention": "g3b", **row}]})
    return make_plan(document, common_settings(document.settings), tmp_path)


@pytest.mark.parametrize(
    ("common", "row", "scale"),
    [
        ({"lr": 4e-3}, {"coefficient_lr": 0.12}, 30.0),
        ({"lr": 4e-3}, {"coefficient_lr": 0.12, "lr": 1e-2}, 12.0),
        ({"lr": 4e-3, "coefficient_lr": 2e-2}, {}, 5.0),
        ({"lr": 4e-3, "coefficient_lr": 2e-2}, {"coefficient_lr": "none"}, 1.0),
        ({"coefficient_lr": 2e-2}, {"lr": 1e-2, "operator_lr_scale": 3}, 3.0),
        ({"recipe": "quick", "coefficient_lr": 8e-3}, {}, 2.0),
    ],
)
def test_studies_may_have_it(tmp_path: Path, common: dict[str, Any], row: dict[str, Any], scale: float) -> None:
    (variant,) = plan_of(tmp_path, common, **row).variants
    assert variant.settings.recipe.operator_lr_scale == scale


def test_a_row_whose_rate_would_change_the_common_factor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"variant 'g3b': its lr .* give operator_lr_scale instead"):
        plan_of(tmp_path, {"coefficient_lr": 2e-2}, lr=1e-2)
