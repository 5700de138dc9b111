"""What a setting may be: every field of every recipe and of every kind of run, against what it can't be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from karat.detect.recipes import DetectRecipe
from karat.detect.settings import DetectSettings
from karat.runs.classification import Settings
from karat.runs.recipes import Recipe
from karat.values import File, Folder, Label, convert, hints

FIELDS = [
    (kind, name)
    for kind in (Settings, Recipe, DetectSettings, DetectRecipe)
    for name in hints(kind)
    if name != "recipe"
]
NUMBERS = (math.nan, math.inf, -math.inf, -1, 10**400, True)
TEXTS = ("", "a\0b", "~nosuchuser/x", [], {"a": 1})


def leaves(kind: Any) -> set[Any]:
    """The plain types within an annotation."""
    return {leaf for part in get_args(kind) for leaf in leaves(part)} or {kind}


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_what_no_setting_can_be_is_refused_by_name(kind: Any, name: str) -> None:
    plain = leaves(hints(kind)[name])
    texts = TEXTS[:0] if name == "track" else TEXTS
    wrong = texts if str in plain else NUMBERS if {int, float} & plain else (math.nan, [1], "~nosuchuser")
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name}="):
            replace(kind(), **{name: value})
    for value in (object(), {"a": {}}):
        with pytest.raises(ValueError, match=f"{name}="):
            replace(kind(), **{name: value})


@pytest.mark.parametrize(("kind", "recipe"), [(Settings, Recipe), (DetectSettings, DetectRecipe)])
def test_a_name_is_a_settings_or_a_recipes(kind: Any, recipe: Any) -> None:
    """Options, the file of a study and what has changed in a run name both without saying whose they are."""
    assert not hints(kind).keys() & hints(recipe).keys()


@pytest.mark.parametrize(
    "aa", ["rand-mX-n2", "rand-n", "rand-m9-mstd", "rand-tweight", "v0-", "v0-x", "augmix-mm3", "rand-p5", "auto"]
)
def test_a_misspelt_policy_is_refused(aa: str) -> None:
    with pytest.raises(ValueError, match="aa="):
        Recipe(aa=aa)


@pytest.mark.parametrize("aa", ["rand-m15-n2-mstd1.0-inc1", "rand-m9-p0.5-mmax12-tweights", "augmix-m5-w4-d2-b1", "3a"])
def test_a_policy_that_timm_reads_is_accepted(aa: str) -> None:
    assert Recipe(aa=aa).aa == aa


@pytest.mark.parametrize("plain", [Path, str])
@pytest.mark.parametrize(
    "form", [lambda k: k, lambda k: k | None, lambda k: tuple[k, ...]], ids=["one", "none", "several"]
)
def test_a_path_below_home_is_there(plain: Any, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given, meant, kind = plain("~/runs/a"), plain(tmp_path / "runs" / "a"), form(plain)
    several = get_args(kind)[1:] == (...,)
    assert convert("output", (given,) if several else given, kind) == ((meant,) if several else meant)
    Path("~/runs/a").mkdir(parents=True)  # a name that is there goes first
    assert convert("output", (given,) if several else given, kind) == ((given,) if several else given)
    assert convert("name", "~/runs/b", Label) == "~/runs/b"


@pytest.mark.parametrize("kind", [Settings, DetectSettings])
def test_every_path_of_a_run_may_lie_below_home(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, a study's file and a config.json come together here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [
        "data",
        "data_dir",
        "init",
        "output",
        "resume",
        *(n for n in ("images", "eval_data", "teacher") if n in hints(kind)),
    ]
    given = {name: f"~/{name}" for name in paths if name != "teacher"}
    for values in (given, {"teacher": "~/teacher"} if "teacher" in paths else {}):
        settings = kind.from_dict(kind().as_dict() | values)
        for name in values:
            assert str(getattr(settings, name)) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "place", "right"),
    [
        *[(Folder, place, True) for place in ("new", "new/er", "folder", "folder/new")],
        *[(Folder, place, False) for place in ("file", "file/new", "file/new/er")],
        *[(File, place, True) for place in ("new", "new/er", "folder/new", "file")],
        *[(File, place, False) for place in ("folder", "file/new", "file/new/er")],
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused(kind: Any, place: str, right: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    if right:
        assert convert("output", tmp_path / place, kind | None) == tmp_path / place
    else:
        with pytest.raises(ValueError, match=r"output='.*is needed here$"):
            convert("output", tmp_path / place, kind | None)
