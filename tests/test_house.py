"""Imports run one way: a room imports from rooms before it in docs/house.md, and no files import in a circle.

Every import counts, those within functions and those for types alone too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from karat.old_paths import PATHS
from support.paths import ROOT

PACKAGE = ROOT / "src" / "karat"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
BELOW_ALL = {"karat.errors", "karat.plots", "karat.values"}


def order() -> dict[str, int]:
    """Room -> its number, from the table of docs/house.md."""
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    return {name: int(number) for number, name in re.findall(r"^\| (\d+) \| \W*(\w+)", page, re.M)}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The files of the package that a module imports, each with its line."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield (inner if inner in FILES else node.module), node.lineno
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_nothing_of_the_package_imports_an_old_path() -> None:
    assert not PATHS.keys() & FILES.keys()
    assert not [
        f"{FILES[module].relative_to(ROOT)}:{line}"
        for module in FILES
        for name, line in imports(module)
        if name in PATHS
    ]


def test_every_room_of_the_page_is_a_folder_and_the_reverse() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(order()) == folders - {"integrations"}  # a public name's place, which imports share/ alone
    assert sorted(order().values()) == list(range(1, len(order()) + 1))


@pytest.mark.parametrize("module", [name for name in FILES if "." in name])
def test_no_arrow_points_upwards(module: str) -> None:
    place = order()
    if room(module) not in place:
        return  # the front: the command line, and the public name of share.transformers
    upwards = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports {found}"
        for found, line in imports(module)
        if found.startswith("karat") and found not in BELOW_ALL and place.get(room(found), 99) > place[room(module)]
    ]
    assert not upwards


def test_what_is_below_all_imports_nothing_of_the_package() -> None:
    for module in BELOW_ALL:
        assert not [found for found, _ in imports(module) if found.startswith("karat") and found not in BELOW_ALL]


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {
        module: {found for found, _ in imports(module) if found in FILES and found != module}
        for module in FILES
        if module != "karat"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_asks_for_a_second_room() -> None:
    long = {str(path.relative_to(ROOT)): n for path in FILES.values() if (n := len(lines(path))) > 350}
    assert not long


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
