"""Fourier edge functions: trigonometric polynomials without a constant term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis.base import EdgeParameter, LinearBasis, check_count


@dataclass(frozen=True)
class Fourier(LinearBasis):
    """φ(x) = Σ_{m=1..G} a_m cos(m x) + b_m sin(m x), with G = `grid` (paper eq. 6; SPEC §2).

    Features in order: cos(x), ..., cos(Gx), sin(x), ..., sin(Gx).
    """

    grid: int = 3

    name: ClassVar[str] = "fourier"

    def __post_init__(self) -> None:
        check_count(self.name, "grid", self.grid, 1)

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("coefficients", 2 * self.grid, amplitude=True),)

    def feature_list(self, x: Tensor) -> list[Tensor]:
        multiples = [m * x for m in range(1, self.grid + 1)]
        return [mx.cos() for mx in multiples] + [mx.sin() for mx in multiples]

    def write_features(self, x: Tensor, out: Tensor) -> None:
        # One sine and cosine; higher multiples by c_{m+1} = 2 c_1 c_m - c_{m-1}, likewise s (SPEC §8).
        cos, sin = out[..., : self.grid, :], out[..., self.grid :, :]
        torch.cos(x, out=cos[..., 0, :])
        torch.sin(x, out=sin[..., 0, :])
        if self.grid == 1:
            return
        twice = 2 * cos[..., 0, :]
        for m in range(1, self.grid):
            for wave, before in ((cos, 1.0), (sin, 0.0)):
                torch.mul(wave[..., m - 1, :], twice, out=wave[..., m, :])
                wave[..., m, :].sub_(wave[..., m - 2, :] if m > 1 else before)

    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        # cos(mx)' = -m sin(mx), sin(mx)' = m cos(mx): the features themselves serve as derivatives.
        G = self.grid
        dx = torch.mul(psi[..., 0, :], dpsi[..., G, :]).addcmul_(psi[..., G, :], dpsi[..., 0, :], value=-1)
        for m in range(1, G):
            dx.addcmul_(psi[..., m, :], dpsi[..., G + m, :], value=m + 1)
            dx.addcmul_(psi[..., G + m, :], dpsi[..., m, :], value=-(m + 1))
        return dx
