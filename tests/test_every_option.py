"""Every option of every command with what it can't be: status 0, or one line and status 2. Options come from tyro's
own parsers, so that a new one is covered; what would train or serve is replaced at its start."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from karat import cli
from karat.detect.commands import ACTIONS
from karat.study.bench.commands import BENCHMARKS
from support.pictures import images

# What stands before the options: a run where a command wants one. Commands with commands of their own are listed whole.
LINES: dict[str, list[str]] = {
    **{name: [] for name in cli.COMMANDS if name not in ("detect", "bench")},
    **{f"detect {name}": [] for name in ACTIONS},
    **{f"bench {name}": [] for name in BENCHMARKS},
    **{name: ["RUN"] for name in ("eval", "hub", "explore", "report", "convert", "transfer")},
    **{f"detect {name}": ["RUN"] for name in ("eval", "compare")},
    "detect predict": ["RUN", "IMAGE"],
    "predict": ["SAVED", "IMAGE"],
    "export": ["SAVED"],
    "analyze": ["curves", "RUN"],
}
VALUES = ("nan", "inf", "-1", "0", "1e400", "", "NOWHERE", "FOLDER", "FILE", "~nosuchuser/x", "a\0b")


class Recorded(Exception):
    """Carries the parser that a command made."""


def parsers(command: str) -> list[argparse.ArgumentParser]:
    """The parsers behind a command."""
    words = command.split()
    function = cli.find(words[0])
    found: list[argparse.ArgumentParser] = []

    def record(kind: Any, **options: Any) -> Any:
        default = {"default": options["default"]} if "default" in options else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the one way to a parser's table
            found.append(tyro.extras.get_parser(kind, **default))
        raise Recorded

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Recorded):
        patch.setattr(tyro, "cli", record)
        if words[0] == "bench":
            record(BENCHMARKS[words[1]])
        function([*words[1:], "--help"])
    return found


def options(command: str) -> list[str]:
    """The long names of a command's options that take a value."""
    actions = [action for parser in parsers(command) for action in parser._actions]
    names = [next((s for s in a.option_strings if s.startswith("--")), "") for a in actions]
    return [n for a, n in zip(actions, names, strict=True) if n and n != "--help" and a.nargs != 0]


def cases() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for command in ("train", *[name for name in LINES if name != "train"]):
        shared = {"train", "compare", "transfer"}
        for option in options(command):
            if command in shared and option in seen:
                continue
            if command in shared:
                seen.add(option)
            yield command, option


CASES = list(cases())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, softmax_run: Path) -> dict[str, str]:
    from karat.share.hub.runs import from_run

    folder = tmp_path_factory.mktemp("odd")
    run = shutil.copytree(softmax_run, folder / "run")
    from_run(run).save_pretrained(folder / "saved")
    picture = next(images(folder / "pictures", 1).rglob("*.png"))
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("x")
    return {
        "RUN": str(run),
        "SAVED": str(folder / "saved"),
        "IMAGE": str(picture),
        "NOWHERE": str(folder / "nowhere" / "x"),
        "FOLDER": str(folder / "empty"),
        "FILE": str(folder / "file.txt"),
    }


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after all checks: training, serving, measuring."""
    from karat.analyze import cost, explore, report
    from karat.study.bench import attention, memory, step, throughput
    from karat.train import convert, engine

    def ends(*arguments: Any, **values: Any) -> Any:
        raise ValueError("this would have begun")

    for owner, name in (
        (engine.Trainer, "fit"),
        (convert, "_fit"),
        (explore, "build_app"),
        (report, "build_report"),
        (attention, "measure"),
        (memory, "measure"),
        (step, "measure"),
        (throughput, "measure"),
        (cost, "cost_table"),
    ):
        monkeypatch.setattr(owner, name, ends)


def outcome(line: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(line)
    return status, err.getvalue()


@pytest.mark.parametrize(("command", "option"), CASES, ids=[f"{c.replace(' ', '-')} {o}" for c, o in CASES])
def test_no_value_of_an_option_is_a_traceback(
    command: str, option: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # parsers of many options are slow, and tests/runs/test_values.py holds each of their fields against each value
    turn = CASES.index((command, option))
    several = "train" in command or command in ("compare", "transfer")
    for value in [VALUES[(turn + 7 * k) % len(VALUES)] for k in range(1 if several else 4)]:
        before = [places.get(word, word) for word in LINES[command]]
        status, said = outcome([*command.split(), *before, option, places.get(value, value)])
        assert status in (0, 2), (value, said)
        assert status == 0 or said.count("\n") == 1, (value, said)


def test_every_command_has_options() -> None:
    assert {command for command, _ in CASES} == set(LINES) - {"transfer"}  # its options are those of train
