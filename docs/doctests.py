"""Doctests of docstrings as code blocks: to Markdown a line that begins with >>> is a quotation."""

from __future__ import annotations

import re
from typing import Any

import griffe

# from >>> to the next empty line, outputs included
EXAMPLE = re.compile(r"(?:^|(?<=\n))([ \t]*)>>> .*?(?=\n[ \t]*\n|\n*\Z)", re.DOTALL)


class Doctests(griffe.Extension):
    """A griffe extension that fences them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """griffe calls this for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with its doctests in fences.

    >>> print(fenced("Adds.\\n\\n>>> 1 + 1\\n2").replace("`", "'"))
    Adds.
    <BLANKLINE>
    '''pycon
    >>> 1 + 1
    2
    '''
    """
    return EXAMPLE.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", text)
