"""What an edge function can be: the families, their registry and the parser of their specs.

>>> from karat.basis import parse_basis
>>> parse_basis("bspline(grid=5)")
BSpline(grid=5, order=3, range=4.0)
>>> str(parse_basis("bspline(grid=5)"))
'bspline(grid=5,order=3,range=4)'

A new family is one file with a frozen dataclass and one line in BASES.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from karat.basis.activations import ACTIVATIONS, with_base
from karat.basis.base import Basis, EdgeParameter, LinearBasis
from karat.basis.bspline import BSpline
from karat.basis.fourier import Fourier
from karat.basis.rational import Rational
from karat.basis.specs import as_text, read_option, split_spec
from karat.basis.wavelets import DerivativeOfGaussian, MexicanHat, Meyer, Morlet, Shannon

BASES: dict[str, type[Basis]] = {
    basis.name: basis
    for basis in (Fourier, BSpline, Rational, MexicanHat, Morlet, DerivativeOfGaussian, Meyer, Shannon)
}

__all__ = ["ACTIVATIONS", "BASES", "Basis", "EdgeParameter", "LinearBasis", "parse_basis", "with_base"]


def parse_basis(spec: str | Basis) -> Basis:
    """The basis that a spec such as "fourier(grid=3)", "dog" or "silu+morlet(omega=5)" names.

    Raises ValueError for a malformed spec, an unknown family or option, or a value out of range.
    """
    return spec if isinstance(spec, Basis) else _parse(as_text(spec), tuple(BASES.items()))


@lru_cache(maxsize=256)
def _parse(spec: str, families: tuple[tuple[str, type[Basis]], ...]) -> Basis:
    """The basis of a spec; remembered for these families alone, as a name may be registered again."""
    known_families = dict(families)
    parts = split_spec(spec)
    if parts is None:
        raise ValueError(f"malformed basis {spec!r}; write it like fourier(grid=3) or dog")
    activation, plus, name = (piece.strip() for piece in parts[0].rpartition("+"))
    if name not in known_families:
        raise ValueError(f"unknown basis {name!r}; choose one of {', '.join(known_families)}")
    family = known_families[name]
    known = [field.name for field in dataclasses.fields(family)]
    options = {}
    for part in parts[1]:
        option = read_option(part, known)
        if option is None:
            takes = f"takes {', '.join(f'{key}=' for key in known)}" if known else "takes no options"
            raise ValueError(f"malformed option {part!r} in basis {spec!r}; {name} {takes}")
        options[option[0]] = option[1]
    basis = family(**options)
    return with_base(basis, activation) if plus else basis
