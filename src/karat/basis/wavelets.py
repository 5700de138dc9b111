"""Wavelet edge functions: one mother wavelet, scaled, shifted and weighted per edge (Wav-KAN, arXiv 2405.12832).

φ(x) = w · mother(x̃), x̃ = (x - τ)/s with |s| kept >= 1e-3 (sign kept). Parameters of an edge, in packing order:
weight w, translation τ, dilation s. The mothers are our reading where the paper is terse (SPEC §2).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from karat.basis.base import Basis, EdgeParameter, Shape

LEAST_DILATION = 1e-3


class Wavelet(Basis):
    """φ(x) = w · mother((x - τ)/s)."""

    breadth: ClassVar[float] = 0.5  # of the dilation that a fit starts from, as a share of the reach

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (
            EdgeParameter("weight", 1, amplitude=True),
            EdgeParameter("translation", 1, amplitude=False, std=0.0),
            EdgeParameter("dilation", 1, amplitude=False, mean=1.0, std=0.0),
        )

    def shapes(self) -> list[Shape]:
        width = self.breadth * self.reach
        return [{"translation": (self.reach * place,), "dilation": (width,)} for place in (-0.6, -0.2, 0.2, 0.6)]

    @abstractmethod
    def mother(self, x: Tensor) -> Tensor:
        """The mother wavelet, elementwise."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """Its derivative, elementwise."""

    def edge(self, x: Tensor, u: Tensor) -> Tensor:
        weight, translation, dilation = u
        return weight * self.mother((x - translation) / _kept_from_zero(dilation))

    def edge_gradients(self, x: Tensor, u: Tensor, dphi: Tensor) -> tuple[Tensor, list[Tensor]]:
        weight, translation, dilation = u
        kept = _kept_from_zero(dilation)
        moved = (x - translation) / kept
        dx = dphi * weight * self.slope(moved) / kept
        return dx, [dphi * self.mother(moved), -dx, torch.where(kept == dilation, -dx * moved, 0)]


def _kept_from_zero(dilation: Tensor) -> Tensor:
    least = torch.where(dilation < 0, -LEAST_DILATION, LEAST_DILATION).to(dilation.dtype)
    return torch.where(dilation.abs() < LEAST_DILATION, least, dilation)


_MEXICAN_HAT = 2 / (math.pi**0.25 * math.sqrt(3))


def _gaussian(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square())


@dataclass(frozen=True)
class MexicanHat(Wavelet):
    """mother(x) = 2/(π^¼ √3) · (x² - 1) · e^(-x²/2)."""

    name: ClassVar[str] = "mexican_hat"

    def mother(self, x: Tensor) -> Tensor:
        return _MEXICAN_HAT * (x.square() - 1) * _gaussian(x)

    def slope(self, x: Tensor) -> Tensor:
        return _MEXICAN_HAT * x * (3 - x.square()) * _gaussian(x)


@dataclass(frozen=True)
class Morlet(Wavelet):
    """mother(x) = cos(ω₀ x) · e^(-x²/2), ω₀ = `omega`."""

    omega: float = 5.0

    name: ClassVar[str] = "morlet"
    breadth: ClassVar[float] = 1.0

    def mother(self, x: Tensor) -> Tensor:
        return torch.cos(self.omega * x) * _gaussian(x)

    def slope(self, x: Tensor) -> Tensor:
        angle = self.omega * x
        return -(self.omega * torch.sin(angle) + x * torch.cos(angle)) * _gaussian(x)


@dataclass(frozen=True)
class DerivativeOfGaussian(Wavelet):
    """mother(x) = -d/dx e^(-x²/2) = x e^(-x²/2)."""

    name: ClassVar[str] = "dog"

    def mother(self, x: Tensor) -> Tensor:
        return x * _gaussian(x)

    def slope(self, x: Tensor) -> Tensor:
        return (1 - x.square()) * _gaussian(x)


@dataclass(frozen=True)
class Meyer(Wavelet):
    """mother(x) = sin(π|x|) · m(ν(|x|)), zero for |x| >= 1.

    ν(t) = t⁴(35 - 84t + 70t² - 20t³) on [0,1] and 1 above; m(t) = 1 for t <= ½, cos(π/2 · ν(2t-1)) above.
    """

    name: ClassVar[str] = "meyer"
    breadth: ClassVar[float] = 1.0

    def mother(self, x: Tensor) -> Tensor:
        size = x.abs().clamp(max=1)  # ν is 1 and m is 0 from there on
        return torch.sin(math.pi * size) * _meyer_window(_meyer_step(size))

    def slope(self, x: Tensor) -> Tensor:
        size = x.abs().clamp(max=1)
        step, wave = _meyer_step(size), math.pi * size
        window_slope = -math.pi * torch.sin(math.pi / 2 * _meyer_step(2 * step - 1)) * _meyer_step_slope(2 * step - 1)
        rise = math.pi * torch.cos(wave) * _meyer_window(step)
        return x.sign() * (rise + torch.sin(wave) * window_slope * _meyer_step_slope(size))


def _meyer_step(t: Tensor) -> Tensor:
    t = t.clamp(0, 1)
    return t**4 * (35 + t * (-84 + t * (70 - 20 * t)))


def _meyer_step_slope(t: Tensor) -> Tensor:
    t = t.clamp(0, 1)
    return 140 * (t * (1 - t)) ** 3


def _meyer_window(t: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * _meyer_step(2 * t - 1))


WINDOWS = ("score", "key")


@dataclass(frozen=True)
class Shannon(Wavelet):
    """mother(x) = sin(x)/x · h(x), h a Hamming window.

    window="score" (default): h(x) = 0.54 + 0.46 cos(x/5) for |x| <= 5π and 0 beyond, a function of the score.
    window="key": h is the symmetric Hamming window over the key index, as Wav-KAN's code has it.
    """

    window: str = "score"

    name: ClassVar[str] = "shannon"

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"shannon: window must be one of {', '.join(WINDOWS)}, got {self.window!r}")
        super().__post_init__()

    def mother(self, x: Tensor) -> Tensor:
        if self.window == "key":
            return torch.sinc(x / math.pi)
        inside = x.clamp(-5 * math.pi, 5 * math.pi)  # sin vanishes at the edge, so the function is continuous
        window = 0.54 + 0.46 * torch.cos(inside / 5)
        return torch.where(x.abs() > 5 * math.pi, 0.0, torch.sinc(inside / math.pi) * window)  # NaN stays NaN

    def slope(self, x: Tensor) -> Tensor:
        inside = x if self.window == "key" else x.clamp(-5 * math.pi, 5 * math.pi)
        sinc = torch.sinc(inside / math.pi)
        # (cos x - sin x / x) / x; by its series near zero, where the difference cancels.
        near = inside.abs() < 0.05
        apart = torch.where(near, 1.0, inside)
        square = inside.square()
        series = inside * (-1 / 3 + square * (1 / 30 - square / 840))
        sinc_slope = torch.where(near, series, (torch.cos(apart) - sinc) / apart)
        if self.window == "key":
            return sinc_slope
        window = 0.54 + 0.46 * torch.cos(inside / 5)
        slope = sinc_slope * window - sinc * 0.46 / 5 * torch.sin(inside / 5)
        return torch.where(x.abs() > 5 * math.pi, 0.0, slope)

    def key_gain(self, num_keys: int) -> Tensor | None:
        if self.window != "key":
            return None
        angle = torch.arange(num_keys, dtype=torch.float64) * (2 * math.pi / max(num_keys - 1, 1))
        # torch.hamming_window(num_keys, periodic=False) in operators that ONNX has
        return 0.54 - 0.46 * torch.cos(angle) if num_keys > 1 else torch.ones_like(angle)
