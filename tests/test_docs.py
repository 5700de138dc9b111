"""The documentation is true: its Python runs, its command lines can be parsed, its pages are all there."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import pytest
import torch

import karat.models.backbones
from karat import KArAtConfig, paper
from karat.analyze import cost
from karat.analyze.analyses import ANALYSES
from karat.basis import BASES
from karat.cli import COMMANDS, main
from karat.data.named import FILES
from karat.data.splits import OPENERS
from karat.models.kan.mlp import MLPS
from karat.models.starts import STARTS
from karat.operator.fixed import FIXED
from karat.operator.orders import ORDERS
from karat.ops import IMPLS
from karat.ops.implementations import IMPLEMENTATIONS
from karat.runs.recipes import RECIPES
from support.prose import numbers, paragraphs, sentences, words

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.name != "paper-tables.md"]
HOUSE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
NEEDED = {
    "transformers": "transformers",
    "karat.share.export": "onnxruntime",
}  # an example says -> the extra it needs


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


PYTHON = [page for page in PAGES if blocks(page, "python")]
LINES = [
    (name_of(page), line)
    for page in PAGES
    for _, text in blocks(page, "console")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page one after the other, in one namespace and a folder of its own."""
    registries: list[dict[Any, Any]] = [
        BASES,
        karat.models.backbones.BACKBONES,
    ]
    before = [dict(registry) for registry in registries]
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # a real one: dataclasses look theirs up
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module)["images"] = torch.randn(2, 3, 224, 224)
    try:
        for line, text in blocks(page, "python"):
            for words, needed in NEEDED.items():
                if words in text:
                    pytest.importorskip(needed)
            exec(compile("\n" * line + text, name_of(page), "exec", dont_inherit=True), vars(module))
    finally:
        for registry, known in zip(registries, before, strict=True):  # pages add to them
            registry.clear()
            registry.update(known)


class Parsed(Exception):
    """The options could be read."""


def stop_after(parser: Callable[[], Any], command: str) -> NoReturn:
    from karat.errors import one_line_errors

    with one_line_errors(command):
        parser()
    raise Parsed


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_are_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each one down to its options, by the command's own parser; nothing is run."""
    words = shlex.split(line, comments=True)
    assert words[0] == "karat", f"{page}: {line}"
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # the files that lines name
    monkeypatch.chdir(tmp_path)
    module = COMMANDS[words[1]][0].split(":")[0]
    monkeypatch.setattr(importlib.import_module(module), "parse", stop_after)
    with pytest.raises(Parsed):
        assert main(words[1:]) == 0, f"{page}: {capsys.readouterr().err}"


def test_there_are_examples() -> None:
    assert len(LINES) > 20
    assert {page.name for page in PYTHON} >= {"README.md", "operator.md", "sharing.md", "extending.md"}


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r"[\w/.-]+\.md", nav))
    assert listed == {name_of(page).removeprefix("docs/") for page in PAGES if page.parent != ROOT}


def code(names: Iterable[str]) -> list[str]:
    return [f"`{name}" for name in names]


# What a page must name, as it stands there.
NAMED: dict[str, list[str]] = {
    "docs/bases.md": code(BASES),
    "docs/method.md": list(BASES),
    "docs/reference/basis.md": [kind.__name__ for kind in BASES.values()],
    "docs/operator.md": code([*(f.name for f in fields(KArAtConfig)), *FIXED, *(name for name, _ in ORDERS), *IMPLS]),
    "docs/cost.md": code(IMPLEMENTATIONS),
    "docs/training.md": [*code([*(f"{prefix}/" for prefix in OPENERS), *RECIPES, *STARTS]), *FILES],
    "src/karat/runs/classification.py": [f"{prefix}/" for prefix in OPENERS],  # the help of --data
    "docs/analysis.md": code(ANALYSES),
    "docs/peers.md": code(MLPS),
}


@pytest.mark.parametrize("page", NAMED)
def test_pages_name_what_there_is(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [name for name in NAMED[page] if not re.search(rf"(?<!\w){re.escape(name)}(?![a-z0-9])", text)]
    assert not missing, f"{page} says nothing of {missing}"


def anchors(page: Path) -> set[str]:
    """What a link may name within a page: its headings, as the site and GitHub spell them, and its objects."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"[^\w\s-]", "", heading).lower() for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"\s+", "-", heading) for heading in headings} | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} isn't there"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """A script of docs/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module


def test_pages_hold_the_tables_that_are_generated(script: Callable[[str], types.ModuleType]) -> None:
    tables = script("tables")
    assert [name_of(page) for page in PAGES if tables.filled(text := page.read_text(encoding="utf-8")) != text] == []


def test_the_cost_of_every_published_model_is_measured(script: Callable[[str], types.ModuleType]) -> None:
    rows = script("tables").read("performance/cost.json")["rows"]
    measured = {(row["model"], row["attention"]) for row in rows}
    assert measured == {*cost.PUBLISHED}, "karat bench cost --output docs/results/performance, see docs/house.md"


def test_published_tables_are_the_papers(script: Callable[[str], types.ModuleType]) -> None:
    """All rows, and the measured costs where they're comparable."""
    published = script("tables").published()
    assert len(re.findall(r"^\| \d+ \|", published, re.MULTILINE)) == len(paper.rows())
    line = next(line for line in published.splitlines() if "| vit_tiny | `g3b,rank=12` |  | params_M |" in line)
    assert "| 6.29 | 6.29 |" in line
    assert "| `g1u` | 85.95 | 85.95 | 17.383 | 17.847 |" in script("tables").cost()


def test_doctests_become_code_blocks(script: Callable[[str], types.ModuleType]) -> None:
    pytest.importorskip("griffe", reason="the site is an optional extra: pip install 'karat[docs]'")
    fenced = script("doctests").fenced
    example = ">>> for i in range(2):\n...     print(i)\n0\n1"
    assert fenced(f"Counts.\n\n{example}\n\nThat is all.") == (f"Counts.\n\n```pycon\n{example}\n```\n\nThat is all.")
    assert fenced("a >>> b") == "a >>> b"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_pages_are_easy_to_read(page: Path) -> None:
    """Sentences of under 18 words on average, no paragraph over 100, at most three figures a sentence."""
    found = paragraphs(page.read_text(encoding="utf-8"))
    every = [sentence for paragraph in found for sentence in sentences(paragraph)]
    assert fmean(words(sentence) for sentence in every) < 18
    assert [paragraph for paragraph in found if words(paragraph) > 100] == []
    assert [sentence for sentence in every if numbers(sentence) > 3] == []


def rooms() -> dict[str, str]:
    """The rooms and root files of docs/house.md, each with its number or "below all", "above all", "old paths"."""
    rows = re.findall(r"^\| (\d+|below all|above all|old paths) \| ([\w.`, ]+) \|", HOUSE, re.MULTILINE)
    return {name: number for number, names in rows for name in re.findall(r"[\w.]+", names)}


def test_the_house_shows_everything_that_is_there(script: Callable[[str], types.ModuleType]) -> None:
    found = {path.name for path in (ROOT / "src" / "karat").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(rooms()) == found - {"__pycache__"}
    drawn = dict(room[0].split() for floor in script("pictures").FLOORS for room in floor)
    assert drawn == {name: number for name, number in rooms().items() if number.isdigit()}


def test_the_house_names_files_that_are_there() -> None:
    named = set(re.findall(rf"`((?:{'|'.join(rooms())})/[\w./]*)`", HOUSE))
    assert len(named) > 20
    assert {path for path in named if not (ROOT / "src" / "karat" / path).exists()} == set()


def test_the_house_names_the_line_where_something_is_added() -> None:
    clauses = [clause for cell in re.findall(r"\| ([^|]+) \|$", HOUSE, re.MULTILINE) for clause in cell.split("; ")]
    named = [(re.findall(r"`(\w+)`", c), path[0]) for c in clauses if (path := re.findall(r"[\w/]+\.py", c))]
    assert len(named) > 20
    for names, path in named:
        text = (ROOT / path if path.startswith("tests/") else ROOT / "src" / "karat" / path).read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf"^(?:{name}\b|def {name}\()", text, re.MULTILINE), f"{name} isn't in {path}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "reference").glob("*.md")), ids=name_of)
def test_the_reference_names_what_is_there(page: Path) -> None:
    """Every object of a page, and the members that it lists."""
    for name, members in re.findall(
        r"^::: (\S+)(?:\n    options:.*?members: \[([^\]]*)\])?", page.read_text(), re.MULTILINE
    ):
        if "transformers" in name:
            pytest.importorskip("transformers")
        found = pkgutil.resolve_name(name)
        for member in filter(None, re.split(r",\s*", members)):
            assert hasattr(found, member) or member in getattr(found, "__annotations__", {}), f"{name} has no {member}"
