"""Names with settings, such as "kan(grid=5,order=3)" or "deep_kan(layers=(10,10))"."""

from __future__ import annotations

import ast
from typing import Any


def parse_call(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword settings of a spec; values are Python literals or bare words.

    Raises ValueError for text that isn't a name with keyword settings.

    >>> parse_call("grkan(init=silu,groups=4)")
    ('grkan', {'init': 'silu', 'groups': 4})
    """
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {_key(word): _literal(word.value) for word in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"can't read {spec!r}; write a name with settings, like kan(grid=5,order=3)")


def _key(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError("** has no place in a spec")
    return word.arg


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
