"""The errors that people see: one line with the value and the remedy, the complaints of tyro's parser among them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast, get_args

from karat.values import check_parsed, hints

Parsed = TypeVar("Parsed")


class TrainingDiverged(RuntimeError):
    """Too many steps had a non-finite loss or gradient; the message is the diagnosis."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def brief(value: object) -> str:
    """A value in a line that is read by people."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Within, a parser that prints a framed complaint to stderr and exits raises ValueError with its words instead.

    Help, which exits with status 0, passes through.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{5,}", " ", line).strip() for line in complaint.getvalue().splitlines()]
        words = " ".join(filter(None, lines)) or "the options can't be read"
        # of a value that a dataclass itself refuses, what it says is enough
        words = re.sub(r"^(\w[\w ]+) \1\b", r"\1", words, flags=re.I)  # the frame's title, and the first line in it
        words = re.sub(r"^Value error Error parsing \S+ (.*) For full helptext, see .*", r"\1", words)
        raise ValueError(
            f"{re.sub(' +', ' ', words)}" + ("" if "--help" in words else f" ({command} --help)")
        ) from None


def parse(parser: Callable[[], Parsed], command: str) -> Parsed:
    """What `parser`, a call of tyro's, returns, held against its annotations. Raises ValueError for what can't be."""
    try:
        with one_line_errors(command):
            found = parser()
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from None
    try:
        check_parsed(found)
    except ValueError as error:
        from tyro.conf import Positional

        marker, kinds = get_args(Positional[int])[1], hints(cast(Any, type(found)))
        places = [name for name, kind in kinds.items() if marker in get_args(kind)]
        raise ValueError(_as_typed(str(error), *places)) from None
    return found


def _as_typed(complaint: str, *positional: str) -> str:
    """A complaint of `values` about a setting, "img_size=-1: ...", with the option as it is typed, --img-size=-1."""
    found = re.match(r"([a-z]\w*)=('.*'|\(.*\)|\S+): ", complaint)
    if found is None or found[1] in positional:
        return complaint
    name = {"preset": "recipe"}.get(found[1], found[1])
    return f"--{name.replace('_', '-')}{complaint[found.end(1) :]}"


def not_scripted(module: object) -> NoReturn:
    """A module's `__prepare_scriptable__`, which torch.jit.script asks for first. Raises ValueError."""
    raise ValueError(
        f"{type(module).__name__} can't be scripted: TorchScript is deprecated; use torch.export.export(model, ...) or "
        "karat export"
    )
