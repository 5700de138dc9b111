"""What every family of edge functions has in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = dict[str, tuple[float, ...]]  # parameter group -> its values


class EdgeParameter(NamedTuple):
    """A named group of `count` learnable numbers that each edge function owns.

    `amplitude` marks the numbers that multiply the function as a whole: an edge scale folds into them, and
    they alone are rescaled when an operator is carried to another token grid (SPEC §9).

    `std` and `mean` give the paper's initialisation, N(mean, std²); `default_std` is the standard deviation,
    up to a common factor, of the initialisation that `karat` uses by default (one value for each number). A shape
    that must keep its sign has a `default_mean` there, and learns in proportion to it.
    """

    name: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a parameter
    amplitude: bool
    mean: float = 0.0
    std: float = 1.0
    default_std: tuple[float, ...] | None = None
    default_mean: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # families that are dataclasses generate their own
class Basis(ABC):
    """A family of learnable univariate functions φ(x; u), one per edge, with F parameters u each.

    Subclasses are frozen dataclasses: their fields are the family's settings, `str(basis)` is the spec that
    `parse_basis` reads back. An `int` must be a whole number, at least 1 where its default is; a `float` above
    zero where its default is.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if field.type in (int, "int") and isinstance(default, int):
                check_count(self.name, field.name, value, min(default, 1))
            elif field.type in (float, "float") and isinstance(default, int | float) and default > 0:
                check_positive(self.name, field.name, value)
                object.__setattr__(self, field.name, float(value))
        str(self)  # so that it's made before any code is compiled, which may take a setting for an open number

    @property
    @abstractmethod
    def parameters(self) -> tuple[EdgeParameter, ...]:
        """The groups of parameters of one edge, in the order in which they are packed into u."""

    @property
    def num_parameters(self) -> int:
        """F: how many numbers one edge owns."""
        return sum(group.count for group in self.parameters)

    @abstractmethod
    def edge(self, x: Tensor, u: Tensor) -> Tensor:
        """φ(x; u), elementwise: x broadcasts against u[f], u has shape (F, ...)."""

    @abstractmethod
    def edge_gradients(self, x: Tensor, u: Tensor, dphi: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dφ/dx · dφ_ and [dφ/du_f · dφ_ for each f], elementwise, in the shape that x and u[f] broadcast to."""

    @property
    def reach(self) -> float:
        """Up to which |x| the functions tell scores apart: a fit to attention brings scores there."""
        return 3.0

    def shapes(self) -> list[Shape]:
        """Values of what isn't an amplitude, of which a fit to attention tries each; here the means alone."""
        return [{group.name: (group.mean,) * group.count for group in self.parameters if not group.amplitude}]

    @property
    def parts(self) -> tuple[str, Basis]:
        """The base activation, "zero" where there is none, and the family beside it."""
        return "zero", self

    def key_gain(self, num_keys: int) -> Tensor | None:
        """A fixed factor for each key (num_keys,) that multiplies the edges' amplitudes, or None."""
        return None

    def __str__(self) -> str:
        made: str | None = self.__dict__.get("_text")
        if made is None:
            made = self._spec()
            object.__setattr__(self, "_text", made)
        return made

    def _spec(self) -> str:
        shown = [
            (field.name, value)
            for field in dataclasses.fields(self)
            if not isinstance(value := getattr(self, field.name), str) or value != field.default
        ]
        options = ",".join(f"{key}={_exact(value)}" for key, value in shown)
        return f"{self.name}({options})" if options else self.name


def _exact(value: object) -> str:
    """A setting as text that gives it back to the last digit: the text goes where the basis itself can't."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


class LinearBasis(Basis):
    """A basis that is linear in its parameters: φ(x; u) = Σ_f u_f ψ_f(x).

    The features ψ_f don't depend on the edge, which is what makes basis attention cheap (SPEC §8).
    """

    @abstractmethod
    def feature_list(self, x: Tensor) -> list[Tensor]:
        """ψ_1(x), ..., ψ_F(x), each of x's shape, by their definition; differentiable any number of times."""

    @abstractmethod
    def write_features(self, x: Tensor, out: Tensor) -> None:
        """Write ψ(x) into `out`: x (..., N), out (..., F, N). The fast path: in place, no graph."""

    @abstractmethod
    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        """Σ_f ψ_f'(x) dψ_f, shape (..., N), given ψ(x) and the gradient dψ, both (..., F, N).

        May overwrite `dpsi`.
        """

    def features(self, x: Tensor) -> Tensor:
        """ψ(x): x (..., N) -> (..., F, N)."""
        return torch.stack(self.feature_list(x), dim=-2)

    def edge(self, x: Tensor, u: Tensor) -> Tensor:
        products = [u[f] * psi for f, psi in enumerate(self.feature_list(x))]
        return torch.stack(torch.broadcast_tensors(*products)).sum(0)

    def edge_gradients(self, x: Tensor, u: Tensor, dphi: Tensor) -> tuple[Tensor, list[Tensor]]:
        psi = torch.stack(self.feature_list(x.unsqueeze(-1)), dim=-2)  # (..., F, 1)
        dpsi = torch.stack([u_f * dphi for u_f in u], dim=-1).unsqueeze(-1)
        dx = self.pull_back(x.unsqueeze(-1).expand_as(dpsi[..., 0, :]), psi.expand_as(dpsi), dpsi).squeeze(-1)
        return dx, [dphi * psi_f for psi_f in psi.squeeze(-1).unbind(-1)]


def check_count(basis: str, option: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{basis}: {option} must be a whole number >= {least}, got {value!r}")


def check_positive(basis: str, option: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{basis}: {option} must be a number > 0, got {value!r}")
