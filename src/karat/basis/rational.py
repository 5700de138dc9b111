"""Rational edge functions, the safe Padé approximant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis.base import Basis, EdgeParameter, Shape


def _tame(count: int) -> tuple[float, ...]:
    """1 / E[x^2i] for x ~ N(0,1), E[x^2i] = (2i-1)!!: the power of a monomial falls with its degree, so that the few
    large scores don't dominate."""
    return tuple(1 / math.prod(range(1, 2 * i, 2)) for i in range(count))


@dataclass(frozen=True)
class Rational(Basis):
    """φ(x) = (a_0 + a_1 x + … + a_m x^m) / (1 + |b_1 x + … + b_n x^n|), safe Padé (SPEC §2).

    For |x| > 1 numerator and denominator are both divided by |x|^n, so that the powers of 1/x take the place of
    those of x and a large score overflows only where φ itself does.
    """

    m: int = 5
    n: int = 4

    name: ClassVar[str] = "rational"

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (
            EdgeParameter("numerator", self.m + 1, amplitude=True, default_std=_tame(self.m + 1)),
            # Above zero: where the highest one vanishes, φ grows as x^m and its gradient explodes.
            EdgeParameter("denominator", self.n, amplitude=False, default_std=(0.01,) * self.n, default_mean=0.05),
        )

    def shapes(self) -> list[Shape]:
        return [{"denominator": (*(0.0,) * (self.n - 1), self.reach**-self.n)}]  # |b_n xⁿ| = 1 at the reach

    def _powers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y in [-1,1] and w >= 1 with x^i / w^n = y^i w^(i-n), w = max(|x|, 1)."""
        w = x.abs().clamp(min=1)
        return x / w, w

    def edge(self, x: Tensor, u: Tensor) -> Tensor:
        y, w = self._powers(x)
        terms = [y**i * w ** (i - self.n) for i in range(max(self.m, self.n) + 1)]
        numerator = sum(u[i] * terms[i] for i in range(self.m + 1))
        odd = sum(u[self.m + j] * terms[j] for j in range(1, self.n + 1))
        return torch.as_tensor(numerator) / (terms[0] + torch.as_tensor(odd).abs())

    def edge_gradients(self, x: Tensor, u: Tensor, dphi: Tensor) -> tuple[Tensor, list[Tensor]]:
        y, w = self._powers(x)
        terms = [y**i * w ** (i - self.n) for i in range(max(self.m, self.n) + 1)]
        # Derivatives of x^i, divided by w^n as the terms are: the factor cancels in φ, so it needs none of its own.
        slopes = [torch.zeros_like(x), *(i * terms[i - 1] for i in range(1, len(terms)))]
        a, b = u[: self.m + 1], u[self.m + 1 :]
        inner = torch.as_tensor(sum(b[j - 1] * terms[j] for j in range(1, self.n + 1)))
        denominator = terms[0] + inner.abs()
        phi = torch.as_tensor(sum(a[i] * terms[i] for i in range(self.m + 1))) / denominator
        share = dphi / denominator
        fall = -phi * inner.sign() * share
        rise = torch.as_tensor(sum(a[i] * slopes[i] for i in range(1, self.m + 1)))
        bend = torch.as_tensor(sum(b[j - 1] * slopes[j] for j in range(1, self.n + 1)))
        dx = share * rise + fall * bend
        return dx, [share * terms[i] for i in range(self.m + 1)] + [fall * terms[j] for j in range(1, self.n + 1)]
