"""The values that the settings of `KArAtConfig` may take, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from karat.basis import ACTIVATIONS
from karat.operator.fixed import FIXED
from karat.operator.orders import BLIND, ORDERS
from karat.ops import IMPLS

Config = Any  # a KArAtConfig, whose module imports this one

# Settings with a fixed list of values.
CHOICES: dict[str, tuple[object, ...]] = {
    "order": tuple(dict.fromkeys(name for name, _ in ORDERS if name not in BLIND)),
    "sharing": ("blockwise", "universal"),
    "base": ("zero", *ACTIVATIONS),
    "edge_scales": (False, True, "published"),
    "simplex": (None, "row", "rank"),
    "residual": (None, "softmax"),
    "position": (None, "query"),
    "position_bias": (None, "relative"),
    "init": ("default", "paper"),
    "impl": IMPLS,
}
# Settings that are gone, with the value that says nothing and may still be read, and values that are.
GONE: dict[str, object] = {"score_gradient": 1.0, "input": "scores", "normalise": None}
GONE_VALUES: dict[str, tuple[str, ...]] = {"position": ("gain",), "gate": ("block",), "blocks": ("last", "alternate")}
# What softmax has a use for, the second beside the first; what only edges of the scores have, only a model whose tokens
# lie on a grid that karat knows, and only a model as a whole. tests/test_every_setting.py tries all of them everywhere.
OF_SOFTMAX = ("basis", "position_bias", "blocks")
OF_EDGES = ("base", "edge_scales", "order", "position")
OF_GRIDS = ("position_bias",)
OF_MODELS = ("blocks", "sharing", *OF_GRIDS)


def without_gone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any version without those that are gone. Raises ValueError for one that meant something."""
    for name, value in settings.items():
        if name in GONE and value != GONE[name]:
            raise ValueError(
                f"the setting {name!r} is gone since version 0.2: no published result uses it; leave it out"
            )
        if isinstance(value, str) and value in GONE_VALUES.get(name, ()):
            raise ValueError(f"{name}={value} is gone since version 0.2: no published result uses it; leave it out")
    return {name: value for name, value in settings.items() if name not in GONE}


def check(config: Config) -> None:
    """Raise ValueError with the first value that can't be, or can't be beside another."""
    for name, known in CHOICES.items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, known))}")
    _check_blocks(config.blocks)
    _check_indices("softmax_heads", config.softmax_heads, count_allowed=True)
    if not _is_number(config.init_scale) or config.init_scale < 0:
        raise ValueError(f"init_scale must be a number >= 0, got {config.init_scale!r}")
    if config.gate != "head" and not _is_number(config.gate):
        raise ValueError(f"unknown gate {config.gate!r}; choose head, or a number for a fixed gate")
    for rule in RULES:
        complaint = rule(config)
        if complaint is not None:
            raise ValueError(complaint)


def refuse(config: Config, names: tuple[str, ...], why: str) -> None:
    """Raise ValueError with the first of these settings that isn't as it is by default."""
    if asked := _set(config, names):
        raise ValueError(f"{asked}: {why}")


def others(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """All settings but these."""
    return tuple(name for name in type(config).__dataclass_fields__ if name not in names)


def _set(config: Config, names: tuple[str, ...]) -> str | None:
    """The first of these settings that isn't as it is by default, as text."""
    fields = type(config).__dataclass_fields__
    found = (f"{name}={value}" for name in names if (value := getattr(config, name)) != fields[name].default)
    return next(found, None)


def _rank(config: Config) -> str | None:
    rank = config.rank
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return None
    return f"rank must be a whole number >= 1, or None for the full operator; got {rank!r}"


def _order(config: Config) -> str | None:
    if config.order_key in ORDERS:
        return ORDERS[config.order_key].refuses(config)
    name, has_rank = config.order_key
    if has_rank:
        return f"{ORDERS[name, False].title} has no rank: write rank=None, not {config.rank!r}"
    return f"rank=None, the full operator, has no W: use order='WPhi', not {name!r}"


def _gate(config: Config) -> str | None:
    if config.gate == 0.0:
        return "gate=0 silences the operator for good: gate='head' starts at zero and learns, softmax has no operator"
    if config.gate == "head" or config.residual:
        return None
    return f"gate={config.gate} belongs beside softmax: add residual='softmax'"


def _initial_size(config: Config) -> str | None:
    if config.init_scale == 1.0:
        return None
    if config.init_scale == 0.0 and config.residual and config.gate == "head":
        return (
            "init_scale=0 with a learned gate that starts at zero: neither gets a gradient from the other; fix the "
            "gate (gate=1), or leave init_scale at 1"
        )
    if config.simplex == "row":
        return f"init_scale={config.init_scale:g}: simplex='row' gives rows of sum one whatever their size; use one"
    edges_last = config.has_edges and ORDERS[config.order_key].layout.edges_last
    if edges_last and config.edge_basis.parameters[0].name == "base" and not config.edge_scales:
        return (
            f"init_scale={config.init_scale:g}: the base activation enters the last map as it is; "
            "edge_scales=True makes its size learnable"
        )
    return None


def _softmax(config: Config) -> str | None:
    if not config.is_softmax:
        return None
    asked = _set(config, others(config, OF_SOFTMAX))
    if asked:
        return f"{asked} shapes an operator, and softmax has none; name a basis, e.g. g3b"
    if config.blocks is not None and config.position_bias is None:
        return (
            f"blocks={config.blocks} says where something is learned, and softmax learns nothing: name a basis, e.g. "
            "g3b, or add position_bias='relative'"
        )
    return None


def _fixed(config: Config) -> str | None:
    if not config.is_fixed:
        return None
    function = FIXED[config.basis]
    asked = _set(config, others(config, ("basis", *function.takes)))
    if asked:
        return (
            f"{asked} doesn't go with {config.basis}, a fixed function, which takes {', '.join(function.takes)} alone"
        )
    function.check()
    return None


def _static(config: Config) -> str | None:
    if not config.is_static:
        return None
    asked = _set(config, OF_EDGES)
    return f"{asked} is about edge functions of the scores; static mixing has none" if asked else None


def _position_bias(config: Config) -> str | None:
    """A bias of scores learns through softmax, or through edge functions."""
    if config.position_bias is None or not config.is_static or config.residual or config.softmax_heads:
        return None
    return (
        f"position_bias={config.position_bias} can't learn: static mixing is blind to the scores; add "
        "residual='softmax' or softmax_heads"
    )


RULES: tuple[Callable[[Config], str | None], ...] = (
    _softmax,
    _fixed,
    _static,
    _rank,
    _order,
    _gate,
    _initial_size,
    _position_bias,
)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_blocks(value: object) -> None:
    if isinstance(value, str):
        if value != "first":
            raise ValueError(f"unknown blocks {value!r}; choose first, or indices such as (0, 2)")
    elif value is not None:
        _check_indices("blocks", value, count_allowed=False)


def _check_indices(name: str, value: object, *, count_allowed: bool) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0 and count_allowed:
        return
    indices = value if isinstance(value, tuple) else None
    if indices is None or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
        counts = " or how many" if count_allowed else ""
        raise ValueError(f"{name} must be indices such as (0, 2){counts}, none of them negative; got {value!r}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name} names an index twice: {value!r}")
