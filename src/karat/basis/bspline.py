"""B-spline edge functions on a uniform grid."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis.base import EdgeParameter, LinearBasis


class LocalSplines(LinearBasis):
    """Splines of degree k, of which k + 1 are not zero at any x: features and gradients touch those alone."""

    @abstractmethod
    def _local(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The k+1 functions that are not zero at x: index of the first, inside?, values, derivatives in x."""

    def _index(self, first: Tensor, inside: Tensor, j: int) -> tuple[Tensor, Tensor]:
        index = first + j
        valid = inside & (index >= 0) & (index < self.num_parameters)
        return index.clamp_(0, self.num_parameters - 1).unsqueeze(-2), valid

    def write_features(self, x: Tensor, out: Tensor) -> None:
        first, inside, values, _ = self._local(x)
        out.copy_(torch.where(x.isnan(), x, 0).unsqueeze(-2))  # NaN stays NaN
        for j, value in enumerate(values):
            index, valid = self._index(first, inside, j)
            out.scatter_add_(-2, index, torch.where(valid, value, 0).unsqueeze(-2))

    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        first, inside, _, slopes = self._local(x)
        dx = torch.zeros_like(x)
        for j, slope in enumerate(slopes):
            index, valid = self._index(first, inside, j)
            dx.addcmul_(torch.where(valid, slope, 0), dpsi.gather(-2, index).squeeze(-2))
        return dx


@dataclass(frozen=True)
class BSpline(LocalSplines):
    """φ(x) = Σ_i c_i B_i(x), the degree-k B-splines of G intervals on [-I, I] (SPEC §2; pykan's convention).

    k = `order`, G = `grid`, I = `range`. The uniform grid is extended by k knots a side, which makes G + k
    functions; they sum to one on [-I, I] and vanish beyond the extended knots.
    """

    grid: int = 10
    order: int = 3
    range: float = 4.0

    name: ClassVar[str] = "bspline"

    @property
    def reach(self) -> float:
        return self.range

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("coefficients", self.grid + self.order, amplitude=True),)

    @property
    def step(self) -> float:
        """Distance of two knots."""
        return 2 * self.range / self.grid

    def _position(self, x: Tensor) -> Tensor:
        """x in knot spacings from the first extended knot: knot i lies at i, B_i lives on [i, i+k+1)."""
        return (x + self.range) / self.step + self.order

    def feature_list(self, x: Tensor) -> list[Tensor]:
        t = self._position(x)  # Cox-de Boor on the integers
        values = [((t >= i) & (t < i + 1)).to(t.dtype) for i in range(self.grid + 2 * self.order)]
        for k in range(1, self.order + 1):
            values = [((t - i) * values[i] + (i + k + 1 - t) * values[i + 1]) / k for i in range(len(values) - 1)]
        return values

    def _local(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        t = self._position(x)
        first = t.floor().clamp_(-1, self.grid + 2 * self.order)
        w = t - first
        values = [torch.ones_like(w)]
        slopes = values
        for k in range(1, self.order + 1):
            if k == self.order:  # B_i' = (B_{i,k-1} - B_{i+1,k-1}) / step
                padded = [torch.zeros_like(w), *values, torch.zeros_like(w)]
                slopes = [(padded[j] - padded[j + 1]) / self.step for j in range(k + 1)]
            raised = [torch.zeros_like(w) for _ in range(k + 1)]
            for j, value in enumerate(values):  # the j-th of the k functions of degree k-1, support from j-k+1
                raised[j].addcmul_(value, (j + 1 - w) / k)
                raised[j + 1].addcmul_(value, (w + (k - 1 - j)) / k)
            values = raised
        inside = (t >= 0) & (t < self.grid + 2 * self.order)
        return first.long() - self.order, inside, values, slopes
