"""A study's file: what it means, and what is said of one that can't be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from karat import cli
from karat.data.splits import Opener
from karat.study.commands import _common
from karat.study.document import parse_document, read_document
from karat.study.plan import common_settings, make_plan
from support.paths import ROOT

SMALL: dict[str, Any] = {"data": "digits", "recipe": "quick", "epochs": 4, "lr": 1, "aa": "none", "track": []}
ROWS: list[dict[str, Any]] = [
    {"attention": "softmax"},
    {"attention": "g3b,rank=4", "name": "operator", "embed_dim": 32, "lr": 0.5, "seeds": 1},
    {"attention": "softmax/kan", "name": "longer", "epochs": 8, "seeds": [5, 7], "equal_time_to": "operator"},
]


def plan_of(found: dict[str, Any], folder: Path = Path("study"), **options: Any) -> Any:
    document = parse_document(found)
    return make_plan(document, common_settings(document.settings), folder, **options)


def test_rows_override_what_is_common_for_themselves_only() -> None:
    plan = plan_of({"seeds": [0, 3], "settings": SMALL, "variants": ROWS})
    softmax, operator, longer = plan.variants
    assert plan.baseline == "softmax"
    assert (softmax.settings.embed_dim, operator.settings.embed_dim) == (64, 32)
    assert [v.settings.recipe.lr for v in plan.variants] == [1.0, 0.5, 1.0]
    assert [v.settings.recipe.epochs for v in plan.variants] == [4, 4, 8]
    assert [v.seeds for v in plan.variants] == [(0, 3), (0,), (5, 7)]
    assert (longer.settings.mlp, longer.settings.recipe.aa, longer.settings.track) == ("kan", None, ())
    assert [job.folder.name for job in plan.jobs()] == [
        "softmax-s0",
        "operator-s0",
        "softmax-s3",
        "longer-s5",
        "longer-s7",
    ]
    assert all(job.settings.seed == job.seed and job.settings.output == job.folder for job in plan.jobs())


def test_a_row_has_no_more_seeds_than_the_study() -> None:
    with pytest.raises(ValueError, match="seeds=3, and the study has 2: give more, or a list"):
        parse_document({"seeds": 2, "variants": [{"attention": "softmax", "seeds": 3}]})


def test_seeds_given_beside_the_file_replace_its_own() -> None:
    plan = plan_of({"seeds": 3, "settings": SMALL, "variants": ROWS[:2]}, seeds=[4])
    assert [(job.variant, job.seed) for job in plan.jobs()] == [("softmax", 4), ("operator", 4)]


def test_a_row_waits_for_step_times_only_without_epochs_of_its_own() -> None:
    rows = [*ROWS, {"attention": "softmax", "name": "as long", "equal_time_to": "operator"}]
    plan = plan_of({"settings": SMALL, "variants": rows})
    assert [variant.waits for variant in plan.variants] == [False, False, False, True]
    assert "as long" not in {job.variant for job in plan.jobs()}


BAD = {
    "unknown 'epoch': did you mean 'epochs'?": {"settings": {"epoch": 3}},
    "unknown 'variant': did you mean 'variants'?": {"variant": []},
    "unknown 'embed_dims': did you mean 'embed_dim'?": {"variants": [{"attention": "softmax", "embed_dims": 3}]},
    "epochs='three': give a whole number": {"settings": {"epochs": "three"}},
    "embed_dim=1.5: give a whole number or none": {"variants": [{"attention": "softmax", "embed_dim": 1.5}]},
    "amp_dtype='half': give one of float32": {"settings": {"amp_dtype": "half"}},
    "opt_betas=[0.9]: give 2 values": {"settings": {"opt_betas": [0.9]}},
    "there are no variants": {"variants": []},
    "has no attention": {"variants": [{"name": "x"}]},
    "named twice": {"variants": [{"attention": "softmax"}, {"attention": "softmax"}]},
    "there is no variant 'softmaxx': did you mean 'softmax'?": {"baseline": "softmaxx"},
    "equal_time_to names itself": {"variants": [{"attention": "softmax", "equal_time_to": "softmax"}]},
    "'data' is common to all rows": {"variants": [{"attention": "softmax", "data": "digits"}]},
    "seeds=0": {"seeds": 0},
    "seeds=[1, 1] names one twice": {"seeds": [1, 1]},
    "unknown basis 'nope'": {"variants": [{"attention": "nope-b"}]},
    "would share a folder": {"variants": [{"attention": "softmax", "name": n} for n in ("a b", "a-b")]},
    "variant 'softmax': lr=-1: give a positive value": {"variants": [{"attention": "softmax", "lr": -1}]},
}


@pytest.mark.parametrize("named", BAD)
def test_what_cannot_be_used_is_named(named: str) -> None:
    found = {"settings": SMALL, "variants": ROWS[:1]} | BAD[named]
    with pytest.raises(ValueError) as error:
        plan_of(found)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("seeds = [", "", "study.toml: "),
        ("[[variants]]\nattention = 'softmax'\nepoch = 3", "", "did you mean 'epochs'?"),
        ("[[variants]]\nattention = 'softmax'", "--resume auto", "leave --resume"),
        ("[[variants]]\nattention = 'softmax'", "g3b", "no variant 'g3b'"),
        ("[[variants]]\nattention = 'softmax'", "--only-table --output out", "no run in out is finished"),
        ("[[variants]]\nattention = 'softmax'", "--seeds 0", "seeds=0"),
        ("[[variants]]\nattention = 'softmax'", "--only-table --time", "leave one of them out"),
        ("[[variants]]\nattention = 'softmax'", "softmax --only-table", "leave 'softmax' out"),
        ("[[variants]]\nattention = 'softmax'", "--only-table --no-measure", "leave --no-measure out"),
        ("[[variants]]\nattention = 'softmax'", "--time --no-measure", "leave --no-measure out"),
        ("[[variants]]\nattention = 'softmax'", "--rounds 3", "give it with --time"),
        ("[[variants]]\nattention = 'softmax'", "g3b --time", "no variant 'g3b'"),
        ("[[variants]]\nattention = 'g3b,blocks=(9,)'\n[settings]\ndepth = 2", "--output out", "there is no block 9"),
        (None, "", "study.toml can't be read"),
    ],
)
def test_the_command_says_it_in_one_line(
    text: str | None,
    line: str,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "study.toml").write_text(text)
    assert cli.main(["compare", *line.split(), "--study", "study.toml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "studies").glob("*.toml")), ids=str)
def test_the_studies_of_the_documentation_can_be_read(path: Path) -> None:
    document = read_document(path)
    plan = make_plan(document, common_settings(document.settings), Path("study"))
    assert len(plan.variants) == len(document.entries) > 1


@pytest.mark.parametrize("name", ["cifar10", "cifar10-screening"])
def test_data_beside_the_file_means_what_it_does_in_the_file(name: str, tmp_path: Path) -> None:
    path = ROOT / "docs" / "studies" / f"{name}.toml"
    written = tmp_path / "study.toml"
    written.write_text(path.read_text().replace('data = "torch/cifar10"', 'data = "some/folder"'))
    plans = []
    for file, line in ((path, ["--data", "some/folder"]), (written, [])):
        document = read_document(file)
        plans.append(make_plan(document, _common(document, line, Opener()), Path("study")))
    assert plans[0] == plans[1]
    assert plans[0].variants[0].settings.data == "some/folder"


@pytest.mark.parametrize("line", ["--only-table", "--time", "--rounds 3", "--no-measure"])
def test_what_is_a_studys_needs_its_file(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *line.split()]) == 2
    error = capsys.readouterr().err
    assert f"{line.split()[0]} is of a study" in error
    assert "--study FILE" in error
