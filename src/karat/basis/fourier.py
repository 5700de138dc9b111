"""Fourier edge functions: trigonometric polynomials without a constant term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis.base import EdgeParameter, LinearBasis

BY_RECURRENCE = 5  # harmonics: more than this many need a way to the others whose error doesn't grow with their square


@dataclass(frozen=True)
class Fourier(LinearBasis):
    """φ(x) = Σ_{m=1..G} a_m cos(m x) + b_m sin(m x), with G = `grid` (paper eq. 6; SPEC §2).

    Features in order: cos(x), ..., cos(Gx), sin(x), ..., sin(Gx).
    """

    grid: int = 3

    name: ClassVar[str] = "fourier"

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("coefficients", 2 * self.grid, amplitude=True),)

    @property
    def reach(self) -> float:
        return math.pi  # half a period

    def feature_list(self, x: Tensor) -> list[Tensor]:
        multiples = [m * x for m in range(1, self.grid + 1)]
        return [mx.cos() for mx in multiples] + [mx.sin() for mx in multiples]

    def write_features(self, x: Tensor, out: Tensor) -> None:
        # One sine and cosine; the next multiples by c_{m+1} = c_{m-1} - 2 s_1 s_m and s_{m+1} = s_{m-1} + 2 s_1 c_m,
        # which is the recurrence of SPEC §8 in another dress: one pass over memory a feature, where that takes two. Its
        # error grows with m², at π/2, so that further ones are sums of angles, twice as many each time: two passes.
        cosines, sines = out[..., : self.grid, :], out[..., self.grid :, :]
        cos, sin = cosines.unbind(-2), sines.unbind(-2)
        torch.cos(x, out=cos[0])
        torch.sin(x, out=sin[0])
        before_cos, before_sin = x.new_ones(()), x.new_zeros(())  # cos 0x, sin 0x
        for m in range(1, min(self.grid, BY_RECURRENCE)):
            torch.addcmul(before_cos, sin[0], sin[m - 1], value=-2, out=cos[m])
            torch.addcmul(before_sin, sin[0], cos[m - 1], value=2, out=sin[m])
            before_cos, before_sin = cos[m - 1], sin[m - 1]
        done = BY_RECURRENCE
        while done < self.grid:
            more = min(done, self.grid - done)
            c, s = cosines[..., done - 1 : done, :], sines[..., done - 1 : done, :]
            first_cos, first_sin = cosines[..., :more, :], sines[..., :more, :]
            torch.mul(first_cos, c, out=cosines[..., done : done + more, :]).addcmul_(first_sin, s, value=-1)
            torch.mul(first_sin, c, out=sines[..., done : done + more, :]).addcmul_(first_cos, s)
            done += more

    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        # cos(mx)' = -m sin(mx), sin(mx)' = m cos(mx): the features themselves serve as derivatives.
        G, psi_f, dpsi_f = self.grid, psi.unbind(-2), dpsi.unbind(-2)
        dx = dpsi_f[G].mul_(psi_f[0])
        dx.addcmul_(psi_f[G], dpsi_f[0], value=-1)
        for m in range(1, G):
            dx.addcmul_(psi_f[m], dpsi_f[G + m], value=m + 1)
            dx.addcmul_(psi_f[G + m], dpsi_f[m], value=-(m + 1))
        return dx
