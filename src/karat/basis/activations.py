"""Base activations b(x): one more feature beside a basis, φ(x) = s_b b(x) + (basis part) (paper eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from karat.basis.base import Basis, EdgeParameter, LinearBasis, Shape


class Activation(NamedTuple):
    """A fixed function and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, torch.ones_like),
    "silu": Activation(F.silu, _silu_slope),
    "gelu": Activation(F.gelu, _gelu_slope),
}


class _WithBase(Basis):
    """What the two kinds below share; `activation` is a key of ACTIVATIONS, `inner` the basis beside it."""

    activation: str
    inner: Basis

    def __init__(self, activation: str, inner: Basis) -> None:
        self.activation, self.inner = activation, inner
        self.__post_init__()

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("base", 1, amplitude=True), *self.inner.parameters)

    @property
    def parts(self) -> tuple[str, Basis]:
        return self.activation, self.inner

    @property
    def reach(self) -> float:
        return self.inner.reach

    def shapes(self) -> list[Shape]:
        return self.inner.shapes()

    def key_gain(self, num_keys: int) -> Tensor | None:
        return self.inner.key_gain(num_keys)

    def _spec(self) -> str:
        return f"{self.activation}+{self.inner}"

    def __repr__(self) -> str:
        return f"with_base({self.inner!r}, {self.activation!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _WithBase) and (self.activation, self.inner) == (
            other.activation,
            other.inner,
        )

    def __hash__(self) -> int:
        return hash((self.activation, self.inner))


class BasisWithBase(_WithBase):
    """φ(x; u) = u_0 b(x) + inner(x; u_1, u_2, ...)."""

    name: ClassVar[str] = "basis_with_base"

    def edge(self, x: Tensor, u: Tensor) -> Tensor:
        return u[0] * ACTIVATIONS[self.activation].value(x) + self.inner.edge(x, u[1:])

    def edge_gradients(self, x: Tensor, u: Tensor, dphi: Tensor) -> tuple[Tensor, list[Tensor]]:
        activation = ACTIVATIONS[self.activation]
        dx, du = self.inner.edge_gradients(x, u[1:], dphi)
        return dx + dphi * u[0] * activation.slope(x), [dphi * activation.value(x), *du]


class LinearBasisWithBase(_WithBase, LinearBasis):
    """The same beside a linear basis: b is one more feature, the first."""

    name: ClassVar[str] = "linear_basis_with_base"
    inner: LinearBasis

    def feature_list(self, x: Tensor) -> list[Tensor]:
        return [ACTIVATIONS[self.activation].value(x), *self.inner.feature_list(x)]

    def write_features(self, x: Tensor, out: Tensor) -> None:
        out[..., 0, :] = ACTIVATIONS[self.activation].value(x)
        self.inner.write_features(x, out[..., 1:, :])

    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        slope = ACTIVATIONS[self.activation].slope(x)
        inner = self.inner.pull_back(x, psi[..., 1:, :], dpsi[..., 1:, :])
        return inner.addcmul_(slope, dpsi[..., 0, :])


def with_base(basis: Basis, activation: str) -> Basis:
    """`basis` with b(x) as one more leading parameter, "base"; "zero" returns `basis` itself.

    Raises ValueError for an activation that isn't known.
    """
    if activation == "zero":
        return basis
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown base activation {activation!r}; choose one of zero, {', '.join(ACTIVATIONS)}")
    return (LinearBasisWithBase if isinstance(basis, LinearBasis) else BasisWithBase)(activation, basis)
