"""KAN layers with Fourier and with radial basis functions on their edges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from karat.basis import EdgeParameter, LinearBasis
from karat.basis.base import check_count, check_positive
from karat.basis.fourier import Fourier
from karat.models.kan.feature_linear import feature_linear
from karat.models.kan.initial import mean_square
from karat.models.tracing import one_node


@dataclass(frozen=True)
class RBF(LinearBasis):
    """φ(x) = Σ_i c_i exp(-((x - μ_i) / h)²): G = `grid` centres μ_i, equally spaced on [-range, range], h apart.

    FastKAN's stand-in for cubic B-splines (Li, arXiv 2405.06721).
    """

    grid: int = 8
    range: float = 2.0

    name: ClassVar[str] = "rbf"

    def __post_init__(self) -> None:
        check_count(self.name, "grid", self.grid, 2)
        check_positive(self.name, "range", self.range)
        object.__setattr__(self, "range", float(self.range))

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("coefficients", self.grid, amplitude=True),)

    @property
    def step(self) -> float:
        """h, the distance of two centres and the width of each bell."""
        return 2 * self.range / (self.grid - 1)

    def _offsets(self, x: Tensor) -> Tensor:
        """(x - μ_f) / h: (...,N) -> (...,G,N)."""
        centres = torch.linspace(-self.range, self.range, self.grid, dtype=x.dtype, device=x.device)
        return (x.unsqueeze(-2) - centres.unsqueeze(-1)) / self.step

    def feature_list(self, x: Tensor) -> list[Tensor]:
        return list(self._offsets(x).square().neg().exp().unbind(-2))

    def write_features(self, x: Tensor, out: Tensor) -> None:
        torch.exp(self._offsets(x).square_().neg_(), out=out)

    def pull_back(self, x: Tensor, psi: Tensor, dpsi: Tensor) -> Tensor:
        # (exp(-z²))' = -2 z/h exp(-z²)
        return dpsi.mul_(psi).mul_(self._offsets(x)).sum(-2).mul_(-2 / self.step)


def _draw(weight: Tensor, basis: LinearBasis, share: float) -> None:
    """Coefficients (F,Q,P) whose sum over features and inputs has variance `share` for inputs from N(0,1)."""
    power = mean_square(lambda x: torch.stack(basis.feature_list(x))).sum().item()
    nn.init.normal_(weight, std=math.sqrt(share / (weight.shape[1] * power)))


class FourierLinear(nn.Module):
    """y_p = β_p + Σ_q Σ_{m=1..G} a_mqp cos(m x_q) + b_mqp sin(m x_q), the FourierKAN layer.

    The basis is `karat.basis.Fourier` with G = `grid`, order of functions included. Variance 1 at the start.

    Parameters: `coefficients` (2G,Q,P), `bias` (P,).
    """

    def __init__(self, in_features: int, out_features: int, *, grid: int = 3) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.basis = Fourier(grid)
        self.coefficients = nn.Parameter(torch.empty(2 * grid, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        _draw(self.coefficients, self.basis, 1.0)
        nn.init.zeros_(self.bias)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """(...,Q) -> (...,P)."""
        return feature_linear(x, self.coefficients, self.basis) + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.basis}"


class RBFLinear(nn.Module):
    """y = V silu(x) + β + Σ_q Σ_i c_iqp exp(-((LN(x)_q - μ_i)/h)²), the FastKAN layer (arXiv 2405.06721).

    A LayerNorm brings the inputs to the centres' range. The two parts have variance ½ each at the start.

    Parameters: `coefficients` (G,Q,P), `base` (a Linear) and `norm` (a LayerNorm).
    """

    def __init__(self, in_features: int, out_features: int, *, grid: int = 8, range: float = 2.0) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.basis = RBF(grid, range)
        self.norm = nn.LayerNorm(in_features)
        self.base = nn.Linear(in_features, out_features)
        self.coefficients = nn.Parameter(torch.empty(grid, in_features, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        self.norm.reset_parameters()
        _draw(self.coefficients, self.basis, 0.5)
        power = mean_square(nn.functional.silu).item()
        nn.init.normal_(self.base.weight, std=math.sqrt(0.5 / (self.in_features * power)))
        nn.init.zeros_(self.base.bias)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """(...,Q) -> (...,P)."""
        return self.base(nn.functional.silu(x)) + feature_linear(self.norm(x), self.coefficients, self.basis)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.basis}"
