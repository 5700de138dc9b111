"""The settings of learnable attention, and the short names for them."""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property

from karat.basis import ACTIVATIONS, Basis, parse_basis, with_base
from karat.ops import IMPLS

ORDERS = ("WPhi", "PhiW", "PhiPhi")
SHARINGS = ("blockwise", "universal")
BASES_OF_SCORES = ("zero", *ACTIVATIONS)
EDGE_SCALES = (False, True, "published")
SIMPLEX = (None, "row", "rank")
RESIDUALS = (None, "softmax")
INITS = ("default", "paper")

_LETTERS = {"blockwise": "b", "universal": "u"}


@dataclass(frozen=True)
class KArAtConfig:
    """What a Kolmogorov-Arnold attention is made of (SPEC §1, §2).

    Args:
        basis: the edge functions, e.g. "fourier(grid=3)"; "softmax" means ordinary attention.
        rank: R of the low-rank operator; None is the full N×N operator (order WPhi only, no W).
        order: "WPhi" (W∘Φ), "PhiW" (Φ∘W) or "PhiPhi" (Φ₂∘Φ₁).
        sharing: "blockwise", each block its own operator, or "universal", one for all blocks.
        base: base activation b: "zero", "identity", "silu" or "gelu".
        edge_scales: learnable s_f (and s_b where b isn't zero) per edge; "published" registers s_b always, as
            the paper's parameter counts do.
        simplex: None, "row" (σ's rows projected onto the simplex) or "rank" (Φ̂'s, before W).
        softmax_heads: indices of the heads that keep softmax; an int n means the last n.
        blocks: indices of the blocks to convert; None means all.
        residual: None, or "softmax": σ = softmax + gate · operator, one gate a head, zero at the start (SPEC §10).
        init: "default" (the output starts with the variance of V) or "paper".
        impl: the implementation of basis attention, see `karat.basis_attention`.

    Raises:
        ValueError: a value that isn't one of these.

    >>> KArAtConfig.parse("g3b,rank=4")
    KArAtConfig(basis='fourier(grid=3)', rank=4, ...)
    >>> str(KArAtConfig.parse("g3b,rank=4"))
    'g3b,rank=4'
    """

    basis: str = "fourier(grid=3)"
    rank: int | None = 12
    order: str = "WPhi"
    sharing: str = "blockwise"
    base: str = "zero"
    edge_scales: bool | str = False
    simplex: str | None = None
    softmax_heads: tuple[int, ...] | int = ()
    blocks: tuple[int, ...] | None = None
    residual: str | None = None
    init: str = "default"
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.basis != "softmax":
            object.__setattr__(self, "basis", str(parse_basis(self.basis)))
            if "+" in self.basis and self.base != "zero":
                raise ValueError(
                    f"basis {self.basis!r} has a base activation already, and base={self.base!r} is another: "
                    "write it once, before the + or as base"
                )
        for name in ("softmax_heads", "blocks"):
            if isinstance(value := getattr(self, name), list | range):
                object.__setattr__(self, name, tuple(value))
        for name, known in (
            ("order", ORDERS),
            ("sharing", SHARINGS),
            ("base", BASES_OF_SCORES),
            ("edge_scales", EDGE_SCALES),
            ("simplex", SIMPLEX),
            ("residual", RESIDUALS),
            ("init", INITS),
            ("impl", IMPLS),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, known))}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a whole number >= 1, or None for the full operator; got {self.rank!r}")
        if self.rank is None and self.order != "WPhi":
            raise ValueError(f"rank=None, the full operator, has no W: use order='WPhi', not {self.order!r}")
        if self.rank is None and self.simplex == "rank":
            raise ValueError("simplex='rank' acts on the R numbers before W; the full operator has none: use 'row'")
        if self.simplex == "rank" and self.order != "WPhi":
            raise ValueError(f"simplex='rank' acts before W in order WPhi; order {self.order!r} takes simplex='row'")
        _check_indices("softmax_heads", self.softmax_heads, count_allowed=True)
        _check_indices("blocks", self.blocks, count_allowed=False)

    @property
    def is_softmax(self) -> bool:
        """Whether this is ordinary attention."""
        return self.basis == "softmax"

    @cached_property
    def edge_basis(self) -> Basis:
        """The family of edge functions, base activation included."""
        if self.is_softmax:
            raise ValueError("softmax attention has no basis; name one, e.g. attention='g3b'")
        return with_base(parse_basis(self.basis), self.base)

    def softmax_head_indices(self, num_heads: int) -> tuple[int, ...]:
        """The heads that keep softmax, ascending. Raises ValueError if there is no such head or all would."""
        asked = self.softmax_heads
        heads = tuple(range(num_heads - asked, num_heads)) if isinstance(asked, int) else tuple(sorted(asked))
        if len(heads) >= num_heads or any(not 0 <= head < num_heads for head in heads):
            raise ValueError(
                f"softmax_heads={asked!r} leaves no head to learn or names one that isn't there; this attention has "
                f"{num_heads} heads, so give fewer than {num_heads}, with indices 0 to {num_heads - 1} "
                "(attention='softmax' keeps softmax everywhere)"
            )
        return heads

    @classmethod
    def parse(cls, spec: str | KArAtConfig) -> KArAtConfig:
        """The configuration that a short name means; `str(config)` is the inverse.

        "softmax", "g3b" (Fourier, grid 3, blockwise), "g1u" (universal), or any basis with "-b" or "-u", e.g.
        "dog-b", "bspline(grid=10,order=3)-u"; then options, "g3b,rank=4,order=PhiW,residual=softmax".

        Raises ValueError for a name or option that can't be read.
        """
        if isinstance(spec, KArAtConfig):
            return spec
        name, *options = _split(spec)
        settings: dict[str, object] = {}
        short = re.fullmatch(r"g(\d+)([bu])", name)
        long = re.fullmatch(r"(.+)-([bu])", name)
        if short:
            settings["basis"] = f"fourier(grid={int(short[1])})"
        elif long:
            settings["basis"] = long[1]
        elif name != "softmax":
            raise ValueError(
                f"can't read the attention {spec!r}; write softmax, g3b, g1u, or a basis with -b (blockwise) or -u "
                "(universal) such as dog-b, then options such as ,rank=4"
            )
        else:
            settings["basis"] = "softmax"
        if match := short or long:
            settings["sharing"] = {letter: sharing for sharing, letter in _LETTERS.items()}[match[2]]
        known = [field.name for field in dataclasses.fields(cls) if field.name not in ("basis", "sharing")]
        for option in options:
            key, equals, text = (part.strip() for part in option.partition("="))
            if not equals or key not in known:
                raise ValueError(f"can't read the option {option!r} of {spec!r}; known options: {', '.join(known)}")
            settings[key] = _value(text)
        return cls(**settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        fourier = re.fullmatch(r"fourier\(grid=(\d+)\)", self.basis)
        letter = _LETTERS[self.sharing]
        name = f"g{fourier[1]}{letter}" if fourier else self.basis if self.is_softmax else f"{self.basis}-{letter}"
        options = [
            f",{field.name}={_text(value)}"
            for field in dataclasses.fields(self)
            if field.name not in ("basis", "sharing") and (value := getattr(self, field.name)) != field.default
        ]
        return name + "".join(options)


def _check_indices(name: str, value: object, *, count_allowed: bool) -> None:
    if value is None and not count_allowed:
        return
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0 and count_allowed:
        return
    indices = value if isinstance(value, tuple) else None
    if indices is None or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
        counts = " or how many" if count_allowed else ""
        raise ValueError(f"{name} must be indices such as (0, 2){counts}, none of them negative; got {value!r}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name} names an index twice: {value!r}")


def _split(spec: str) -> list[str]:
    """Cut at the commas outside of parentheses."""
    parts, depth = [""], 0
    for letter in spec:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _text(value: object) -> str:
    return str(value).replace(" ", "")
