"""Every option of every command with what it can't be: status 0, or one line and status 2, within 10 s.

Options come from tyro's own parsers, so that a new one is covered. Each is given every value through `cli.main`; parser
and checks run, and what comes after them, training, serving, measuring, is replaced at its start. What tyro makes of a
command's dataclass is kept between calls. `compare` and `transfer` read train's options by train's own code
(`read_settings`), so each of these has one value there, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from tyro._parsers import ParserSpecification

from karat import cli, errors
from karat.detect.commands import ACTIONS
from karat.study.bench.commands import BENCHMARKS
from karat.values import check_parsed
from support.detection import TINY as DETECTOR
from support.detection import tiny, write_coco
from support.pictures import images
from support.training import TINY as SMALL


def words(values: dict[str, Any]) -> list[str]:
    """Settings as options of the command line."""
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return [w for name, value in several.items() for w in (f"--{name.replace('_', '-')}", *map(str, value))]


# What stands before the options. Commands with commands of their own are listed whole.
LINES: dict[str, list[str]] = {
    **{name: [] for name in cli.COMMANDS if name not in ("detect", "bench")},
    **{f"detect {name}": ["DETECTED"] for name in ACTIONS},
    **{f"bench {name}": [] for name in BENCHMARKS},
    **{name: ["RUN"] for name in ("eval", "hub", "explore", "report")},
    "train": words(SMALL),
    "compare": ["softmax", *words(SMALL)],
    "transfer": ["KARAT", "--data-fraction", "0.1", "--device", "cpu", "--track"],
    "convert": ["RUN", "--images", "8", "--batch-size", "8", "--device", "cpu"],
    "detect train": ["--data", "COCO", *words(DETECTOR)],
    "detect predict": ["DETECTED", "IMAGE"],
    "predict": ["SAVED", "IMAGE"],
    "export": ["SAVED", "--format", "pt2"],
    "analyze": ["attention", "RUN"],
    "paper": ["table1", "--run", "1"],
}
PLACES = ("NOWHERE/x", "FOLDER", "FILE")
VALUES = ("nan", "inf", "-1", "0", "1e400", "", *PLACES, "~nosuchuser/x", "a\0b")
NO_NUMBERS, NO_TEXTS = ("nan", "inf", "-1", "1e400"), ("", "~nosuchuser/x", "a\0b")
BEGUN = "this would have begun"


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


def options(command: str) -> Iterator[tuple[str, str]]:
    """The long names of a command's options that take a value, and what tyro says that they take."""
    for action in (action for parser in parsers(command) for action in parser._actions):
        name = next((s for s in action.option_strings if s.startswith("--")), "")
        if name and action.nargs != 0:
            yield name, str(action.metavar)


CASES: dict[tuple[str, str], str] = {(c, name): takes for c in LINES for name, takes in options(c)}


def values(command: str, option: str) -> tuple[str, ...]:
    """All of them, but one of a command that shares train's code."""
    turn = list(CASES).index((command, option)) % len(VALUES)
    return (VALUES[turn],) if command in ("compare", "transfer") and ("train", option) in CASES else VALUES


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, softmax_run: Path, karat_run: Path) -> dict[str, str]:
    from karat.detect.task import train
    from karat.share.hub.runs import from_run

    folder = tmp_path_factory.mktemp("odd")
    run = shutil.copytree(softmax_run, folder / "run")
    from_run(run).save_pretrained(folder / "saved")
    picture = next(images(folder / "pictures", 1).rglob("*.png"))
    data = write_coco(folder / "coco")
    train(tiny(data, folder / "detected", epochs=1))
    return {
        "RUN": str(run),
        "KARAT": str(karat_run),
        "COCO": str(data),
        "DETECTED": str(folder / "detected"),
        "SAVED": str(folder / "saved"),
        "IMAGE": str(picture),
    }


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """tyro's reading of a command's dataclass, once for each default."""
    found: dict[str, Any] = {}

    def once(f: Any, **arguments: Any) -> Any:
        key = repr((f, arguments))
        if key not in found:
            found[key] = make(f, **arguments)
        return found[key]

    return once


@pytest.fixture(scope="module", autouse=True)
def nothing_long(places: dict[str, str]) -> Iterator[None]:
    """What comes after all checks: training, serving, measuring."""
    from karat.analyze import cost, explore, report
    from karat.analyze.analyses import attention as maps
    from karat.detect import compare
    from karat.detect import measure as detected
    from karat.paper import run
    from karat.share.export import pt2
    from karat.study.bench import attention, memory, step, throughput
    from karat.train import convert, engine, measure

    def ends(*arguments: Any, **values: Any) -> Any:
        raise ValueError(BEGUN)

    def looks(subjects: Any) -> Any:
        ends([subject.samples for subject in subjects])

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (engine.Trainer, "fit"),
            (convert, "_fit"),
            (measure, "evaluate"),
            (detected, "measure"),
            (compare, "draw_epochs"),
            (run, "command_words"),
            (explore, "build_app"),
            (report, "_section"),
            (attention, "measure"),
            (memory, "measure"),
            (step, "measure"),
            (throughput, "measure"),
            (cost, "cost_table"),
            (pt2, "exported_program"),
        ):
            patch.setattr(owner, name, ends)
        patch.setattr(maps, "analyse_attention", looks)
        patch.setattr(ParserSpecification, "from_callable_or_type", kept(ParserSpecification.from_callable_or_type))
        yield


def outcome(line: list[str]) -> tuple[int, str]:
    """Status and stderr of a call, which fails where it takes more than 10 s."""

    def late(number: int, frame: Any) -> None:
        pytest.fail(f"{line} takes more than 10 s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(line)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, err.getvalue()


@pytest.mark.parametrize(("command", "option"), CASES, ids=[f"{c.replace(' ', '-')} {o}" for c, o in CASES])
def test_no_value_of_an_option_is_a_traceback(
    command: str, option: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE").write_text("x")
    takes = CASES[command, option]
    number = re.search("INT|FLOAT", takes) and not re.search("STR|PATH", takes)
    times = 1 if "..." in takes else max(1, len(re.findall("INT|FLOAT", takes)))
    refused = (*NO_NUMBERS, *NO_TEXTS) if number else NO_TEXTS
    wrong: list[tuple[str, int, str]] = []
    for value in values(command, option):
        line = [*command.split(), *(places.get(word, word) for word in LINES[command]), option, *[value] * times]
        status, said = outcome(line)
        if status not in (0, 2) or (status == 2 and said.count("\n") != 1):
            wrong.append((value, status, said))
        elif value in refused and (status == 0 or BEGUN in said):
            wrong.append((value, 0, "accepted"))
    assert not wrong


def own(command: str, option: str) -> bool:
    """Whether an option isn't train's, read by train's code, or is read before the others too."""
    early = ("--data", "--init", "--resume", "--output", "--recipe", "--model")
    return command not in ("compare", "transfer") or ("train", option) not in CASES or option in early


TEXTS = [key for key, takes in CASES.items() if re.search("STR|PATH", takes) and own(*key)]


@pytest.mark.parametrize("command", LINES)
def test_a_path_below_home_is_the_same_to_every_option(
    command: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the parser hands on, or is said instead; and so it is of what stands before the options."""
    home = tmp_path / "home"
    home.mkdir()
    for name, place in places.items():
        (home / name).symlink_to(place)
    (home / "study.toml").write_text('[[variants]]\nattention = "softmax"\n[[variants]]\nattention = "g3b"\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    heard: list[Any] = []

    def hear(found: Any) -> None:
        check_parsed(found)
        heard.append(found)
        raise ValueError(BEGUN)

    monkeypatch.setattr(errors, "check_parsed", hear)
    lines = [
        [*LINES[command], option, "{}/study.toml" if option == "--study" else "{}/RUN"]
        for name, option in TEXTS
        if name == command
    ]
    for words in ([f"{{}}/{word}" if word in places else word for word in line] for line in [LINES[command], *lines]):
        found = []
        for where in ("~", str(home)):
            status, said = outcome([*command.split(), *(word.replace("{}", where) for word in words)])
            # what is refused is said as it was given, cut anywhere
            said = "".join(said.split()).replace(str(home), "~")
            found.append((status, said, repr(heard)))
            heard.clear()
        assert found[0] == found[1]
        assert "~" not in found[0][-1]


def test_every_command_has_options() -> None:
    assert {command for command, _ in CASES} == set(LINES)
