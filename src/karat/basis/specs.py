"""Specs, "name(key=value,...)", and lists of them: the one grammar of bases, attentions, MLPs and models.

Commas and equals signs separate outside of brackets only. Values are numbers, other Python literals, or bare words. A
name may have others before a plus sign, "silu+fourier(grid=3)".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from typing import Any

TRUTH = {"true": True, "false": False}  # a text would count as true
_SPEC = re.compile(r"\s*((?:\w+\s*\+\s*)*\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def as_text(spec: object) -> str:
    """A spec that can be read. Raises ValueError for what isn't text, such as None."""
    if not isinstance(spec, str):
        raise ValueError(f"{spec!r} is no name; write text such as 'g3b' or 'fourier(grid=3)'")
    return spec


def split_list(text: str) -> list[str]:
    """The parts between the commas outside of brackets, without spaces around them.

    >>> split_list("dog-b, softmax_heads=(0,2), rank=4")
    ['dog-b', 'softmax_heads=(0,2)', 'rank=4']
    """
    parts, depth = [""], 0
    for letter in as_text(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def split_spec(spec: str) -> tuple[str, list[str]] | None:
    """The name and the options of a spec, as text; None if it isn't one.

    Raises ValueError for an option that is given twice.

    >>> split_spec("silu+bspline(grid=5, order=2)")
    ('silu+bspline', ['grid=5', 'order=2'])
    """
    match = _SPEC.fullmatch(as_text(spec))
    if match is None:
        return None
    options = [part for part in split_list(match[2] or "") if part]
    keys = [option.partition("=")[0].strip() for option in options]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{spec!r} gives {twice[0]} twice; give it once")
    return match[1], options


def read_option(option: str, known: Container[str]) -> tuple[str, Any] | None:
    """The key and the value of "key=value"; None if it isn't that or the key isn't known."""
    key, equals, text = (piece.strip() for piece in option.partition("="))
    return (key, read_value(text)) if equals and key in known else None


def read_value(text: str) -> Any:
    """A number (0 may lead) or another Python literal, true and false in small letters too; any other text is itself.

    >>> read_value("4"), read_value("1e-3"), read_value("(0,2)"), read_value("first"), read_value("false")
    (4, 0.001, (0, 2), 'first', False)
    """
    for read in (int, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError):  # of the last kind is {[]: 1}
            continue
    return TRUTH.get(text, text)


def parse_call(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword settings of a spec such as "kan(grid=5,order=3)" or "deep_kan(layers=(10,10))".

    Raises ValueError for text that isn't a name with keyword settings.

    >>> parse_call("grkan(init=silu,groups=4)")
    ('grkan', {'init': 'silu', 'groups': 4})
    """
    name, options = split_spec(spec) or ("", [])
    settings = {}
    for option in options:
        key, _, text = (piece.strip() for piece in option.partition("="))
        value = read_value(text)
        if not key.isidentifier() or (value is text and not text.isidentifier()):
            name = ""
        settings[key] = value
    if not name.isidentifier():
        raise ValueError(f"can't read {spec!r}; write a name with settings, like kan(grid=5,order=3)")
    return name, settings


def without(spec: str, key: str) -> tuple[str, str | None]:
    """A spec with the setting `key` taken out, and its value as text; None where it has none, or isn't a spec.

    >>> without("vit(pos_embed=sincos, attn_init=mimetic)", "attn_init"), without("vit(depth=2)", "attn_init")
    (('vit(pos_embed=sincos)', 'mimetic'), ('vit(depth=2)', None))
    """
    name, options = split_spec(spec) or ("", [])
    pairs = [(option, [piece.strip() for piece in option.split("=", 1)]) for option in options]
    found = [pair[1] for _, pair in pairs if pair[0] == key and len(pair) == 2]
    if len(found) != 1:
        return spec, None
    rest = [option for option, pair in pairs if pair[0] != key]
    return f"{name}({','.join(rest)})" if rest else name, found[0]
