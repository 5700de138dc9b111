"""The settings of learnable attention, and the short names for them."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from karat.basis import Basis, parse_basis, with_base
from karat.basis.specs import read_option, split_list
from karat.operator.fixed import FIXED
from karat.operator.orders import BLIND
from karat.operator.rules import GONE, check, others, without_gone

_LETTERS = {"blockwise": "b", "universal": "u"}

# Names for what a configuration is recommended for; `str` gives the explicit form.
ALIASES = {"recommended": "static-b,residual=softmax"}

# What stands alone in a name: nothing to share between blocks.
UNLETTERED = ("softmax", *FIXED)

# Settings under which equal numbers mean the same function, whatever they are; heads are compared by their indices.
_WITHOUT_MEANING = ("edge_scales", "softmax_heads", "blocks", "position_bias", "init", "init_scale", "impl")

Class = TypeVar("Class", bound=type)


def _of_any_version(cls: Class) -> Class:
    """Let a class be made of settings of older versions: what is gone is left out, or refused where it was in use."""
    make = vars(cls)["__init__"]

    @functools.wraps(make)
    def init(self: object, *args: Any, **settings: Any) -> None:
        make(self, *args, **without_gone(settings))

    cls.__init__ = init  # type: ignore[misc]  # of this very class
    return cls


@_of_any_version
@dataclass(frozen=True)
class KArAtConfig:
    """What a Kolmogorov-Arnold attention is made of (SPEC §1, §2).

    Args:
        basis: the edge functions, e.g. "fourier(grid=3)"; "softmax" means ordinary attention, "sigmoid", "relu",
            "entmax15", "sparsemax", "lsa", "diff" another fixed function (`karat.operator.fixed`); "static" a learned
            matrix of the given rank in each head, σ_kn = Σ_p W_np C_kp, blind to the scores; "row", with rank=None,
            one learned row a head, σ_kn = W_n, blind to scores and queries.
        rank: R of the low-rank operator; None is the full N×N operator (order WPhi only, no W).
        order: "WPhi" (W∘Φ), "PhiW" (Φ∘W), "PhiPhi" (Φ₂∘Φ₁), or "Pointwise": σ_kn = φ(A_kn), one function a head
            that all keys share, no W, rank=None; with a rank and position="query", static mixing of that rank is
            added, σ_kn = φ(A_kn) + Σ_p W_np C_kp.
        sharing: "blockwise", each block its own operator, or "universal", one for all blocks.
        base: base activation b: "zero", "identity", "silu" or "gelu".
        edge_scales: learnable s_f (and s_b where b isn't zero) per edge; "published" registers s_b always, as
            the paper's parameter counts do.
        simplex: None, "row" (σ's rows projected onto the simplex) or "rank" (Φ̂'s, before W).
        softmax_heads: indices of the heads that keep softmax; an int n means the last n.
        blocks: indices of the blocks to convert, or "first" (half of those that can be converted, the middle one of an
            odd number among them); None means all.
        residual: None, or "softmax": σ = softmax + gate · operator (SPEC §10).
        gate: beside softmax: "head", a learnable gate for each head, zero at the start, or a number other than 0, a
            fixed gate without a parameter.
        position: None, or "query", Φ̂(A)_k,p + C_k,p with learnable C (H,N,R) for the query's place, at the start as
            strong as the sums (zero with init="paper"); in order Pointwise static mixing. Self-attention only.
        position_bias: None, or "relative": a learnable bias for each head and offset of two tokens, added to the
            scores by `karat.karatize`; also with "softmax", where it and `blocks` are all that can be set. Something
            must see the scores and teach it: softmax, or an operator with edge functions.
        init: "default" (the output starts as large as softmax's mean of V, beside softmax as V) or "paper".
        init_scale: factor of the operator's initial output; with 0.0 its last map starts at zero (not beside a gate
            that is learned and starts there too: neither would learn).
        impl: the implementation of basis attention, see `karat.basis_attention`. Where scores are given or σ is formed
            through a last layer of edge functions (see `KArAtOperator.attend`) the definition computes it, whatever
            is named here.

    Raises:
        ValueError: a value that isn't one of these, or two that don't go together; a setting of an older version that
            is gone, unless it has the value that says nothing.

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
    blocks: tuple[int, ...] | str | None = None
    residual: str | None = None
    gate: str | float = "head"
    position: str | None = None
    position_bias: str | None = None
    init: str = "default"
    init_scale: float = 1.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.has_edges:
            object.__setattr__(self, "basis", str(parse_basis(self.basis)))
            if "+" in self.basis and self.base != "zero":
                raise ValueError(
                    f"basis {self.basis!r} has a base activation already, and base={self.base!r} is another: "
                    "write it once, before the + or as base"
                )
        for name in ("softmax_heads", "blocks"):
            if isinstance(value := getattr(self, name), list | range):
                object.__setattr__(self, name, tuple(value))
        for name in ("gate", "init_scale"):
            if type(value := getattr(self, name)) is int:
                object.__setattr__(self, name, float(value))
        check(self)

    @property
    def is_softmax(self) -> bool:
        """Whether this is ordinary attention."""
        return self.basis == "softmax"

    @property
    def leaves_attention(self) -> bool:
        """Whether a model's own attention stays as it is: softmax, without anything added."""
        return self.is_softmax and self.position_bias is None

    @property
    def begins_as_softmax(self) -> bool:
        """Whether a model begins as the one with softmax attention: a learned gate, or a last map, that starts at zero.

        >>> [KArAtConfig.parse(f"g3b,residual=softmax{more}").begins_as_softmax for more in ("", ",gate=1")]
        [True, False]
        """
        return self.residual == "softmax" and (self.gate == "head" or self.init_scale == 0.0)

    @property
    def is_fixed(self) -> bool:
        """Whether σ is a fixed function of the scores, another than softmax."""
        return self.basis in FIXED

    @property
    def has_operator(self) -> bool:
        """Whether a `KArAtOperator` can be made of it, one without anything to learn included."""
        return not self.is_softmax and (not self.is_fixed or FIXED[self.basis].sees_scores)

    @property
    def is_static(self) -> bool:
        """Whether σ is a learned matrix or row, blind to the scores."""
        return self.basis in BLIND

    @property
    def has_edges(self) -> bool:
        """Whether there are edge functions of the scores."""
        return not (self.is_softmax or self.is_fixed or self.is_static)

    @property
    def order_key(self) -> tuple[str, bool]:
        """The name of the order in `karat.operator.orders.ORDERS`, and whether there is a rank."""
        return self.basis if self.is_static else self.order, self.rank is not None

    @functools.cached_property
    def edge_basis(self) -> Basis:
        """The family of edge functions, base activation included."""
        if not self.has_edges:
            kind = "static mixing" if self.is_static else f"{self.basis} attention"
            raise ValueError(f"{kind} has no basis; name one, e.g. attention='g3b'")
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

    def same_functions(self, other: KArAtConfig, num_heads: int) -> bool:
        """Whether operators of both mean the same by equal numbers, in attention of so many heads.

        Where blocks lie, how they start and which implementation runs them is no part of that.
        """
        if self.is_softmax or other.is_softmax:
            return False
        heads = self.softmax_head_indices(num_heads) == other.softmax_head_indices(num_heads)
        return heads and all(getattr(self, name) == getattr(other, name) for name in others(self, _WITHOUT_MEANING))

    @classmethod
    def parse(cls, spec: str | KArAtConfig) -> KArAtConfig:
        """The configuration that a short name means; `str(config)` is the inverse.

        "softmax", "sigmoid" and others of `karat.operator.fixed`, "g3b" (Fourier, grid 3, blockwise), "g1u"
        (universal), or any basis with "-b" or "-u", e.g. "dog-b", "bspline(grid=10,order=3)-u", "static-b"; or one of
        ALIASES, "recommended"; then options, "g3b,rank=4,order=PhiW,residual=softmax". Of an option that is given twice
        the last counts.

        Raises ValueError for a name or option that can't be read.
        """
        if isinstance(spec, KArAtConfig):
            return spec
        name, *options = split_list(spec)
        if name in ALIASES:
            name, *usual = split_list(ALIASES[name])
            options = usual + options
        settings: dict[str, Any] = {}
        short = re.fullmatch(r"g(\d+)([bu])", name)
        long = re.fullmatch(r"(.+)-([bu])", name)
        if short:
            settings["basis"] = f"fourier(grid={int(short[1])})"
        elif long:
            settings["basis"] = long[1]
        elif name not in UNLETTERED:
            raise ValueError(
                f"can't read the attention {spec!r}; write {', '.join(UNLETTERED)}, g3b, g1u, or a basis with -b "
                f"(blockwise) or -u (universal) such as dog-b, or {', '.join(ALIASES)}; then options such as ,rank=4"
            )
        else:
            settings["basis"] = name
        if match := short or long:
            settings["sharing"] = {letter: sharing for sharing, letter in _LETTERS.items()}[match[2]]
        known = [field.name for field in dataclasses.fields(cls) if field.name not in ("basis", "sharing")]
        for option in options:
            read = read_option(option, (*known, *GONE))
            if read is None:
                raise ValueError(f"can't read the option {option!r} of {spec!r}; known options: {', '.join(known)}")
            settings[read[0]] = read[1]
        return cls(**settings)

    @classmethod
    def explicit(cls, spec: str) -> str:
        """A spec as it was written, but for a name of ALIASES: what that means is written out, since it may change."""
        return str(cls.parse(spec)) if split_list(spec)[0] in ALIASES else spec

    def __str__(self) -> str:
        fourier = re.fullmatch(r"fourier\(grid=(\d+)\)", self.basis)
        letter = _LETTERS[self.sharing]
        name = (
            f"g{fourier[1]}{letter}"
            if fourier
            else self.basis
            if self.basis in UNLETTERED
            else f"{self.basis}-{letter}"
        )
        options = [
            f",{field.name}={_text(value)}"
            for field in dataclasses.fields(self)
            if field.name not in ("basis", "sharing") and (value := getattr(self, field.name)) != field.default
        ]
        return name + "".join(options)


def _text(value: object) -> str:
    return str(value).replace(" ", "")
