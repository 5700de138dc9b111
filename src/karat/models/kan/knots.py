"""B-splines on grids of their own for each input, and fitting their coefficients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from karat.basis import EdgeParameter
from karat.basis.bspline import LocalSplines


def uniform_knots(low: Tensor, high: Tensor, grid: int, order: int) -> Tensor:
    """`grid` equal intervals on [low, high], extended by `order` knots a side: (Q,), (Q,) -> (Q, grid+2·order+1)."""
    steps = torch.arange(-order, grid + order + 1, dtype=low.dtype, device=low.device)
    return low.unsqueeze(1) + (high - low).unsqueeze(1) * steps / grid


def adaptive_knots(samples: Tensor, grid: int, order: int, adaptive: float, dtype: torch.dtype) -> Tensor:
    """Knots that follow samples (S,Q) -> (Q, grid+2·order+1): `adaptive` of the way from equal steps to quantiles.

    The extension beyond the range has equal steps, as pykan's has. dtype: that they're going to have.
    """
    low, high = samples.amin(0), samples.amax(0)
    # An input that hardly varies still gets a range whose ends the dtype can tell apart.
    spread = torch.maximum(high - low, max(1e-3, 16 * torch.finfo(dtype).eps) * (1 + low.abs()))
    margin = 0.01 * spread  # so that no sample lies on the last knot, where the half-open support ends
    knots = uniform_knots(low - margin, low + spread + margin, grid, order)
    if adaptive and grid > 1:
        shares = torch.arange(1, grid, dtype=samples.dtype, device=samples.device) / grid
        ranks = (shares * (len(samples) - 1)).round().long()
        quantiles = samples.sort(0).values[ranks].t()
        inner = slice(order + 1, order + grid)
        knots[:, inner] = (1 - adaptive) * knots[:, inner] + adaptive * quantiles
    return knots


def check_apart(knots: Tensor, dtype: torch.dtype, remedy: str) -> None:
    """Raise ValueError where a dtype can't tell knots (Q,K) apart."""
    held, limits = knots.to(dtype).double(), torch.finfo(dtype)
    larger = torch.maximum(held[:, :-1].abs(), held[:, 1:].abs())
    if (held.diff(dim=1) < 2 * (limits.eps * larger + limits.tiny)).any():
        raise ValueError(f"knots would lie closer than {dtype} can tell apart: {remedy}")


class KnotSpline(LocalSplines):
    """B_1(x_q), ..., B_F(x_q) of degree k on the knots of input q: x (...,Q), F = K - k - 1 functions for K knots.

    The general, slower sibling of `karat.basis.BSpline`: knots (Q,K) need not have equal steps. Knots must rise.
    """

    name: ClassVar[str] = "knot_spline"

    def __init__(self, knots: Tensor, order: int) -> None:
        self.knots, self.order = knots, order

    @property
    def parameters(self) -> tuple[EdgeParameter, ...]:
        return (EdgeParameter("coefficients", self.knots.shape[1] - self.order - 1, amplitude=True),)

    def _spec(self) -> str:
        return f"{self.name}(knots={tuple(self.knots.shape)},order={self.order})"

    def feature_list(self, x: Tensor) -> list[Tensor]:
        t = self.knots.to(x.dtype).t()  # (K,Q); Cox-de Boor as it is written
        values = [((x >= t[i]) & (x < t[i + 1])).to(x.dtype) for i in range(len(t) - 1)]
        for k in range(1, self.order + 1):
            values = [
                (x - t[i]) / (t[i + k] - t[i]) * values[i]
                + (t[i + k + 1] - x) / (t[i + k + 1] - t[i + 1]) * values[i + 1]
                for i in range(len(values) - 1)
            ]
        return values

    def _local(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        k, (Q, K) = self.order, self.knots.shape
        knots = self.knots.to(x.dtype)
        flat = x.reshape(-1, Q).t().contiguous()  # (Q,T): one row of knots searches one row of values
        interval = torch.searchsorted(knots.contiguous(), flat, right=True) - 1
        inside = (interval >= 0) & (interval < K - 1)
        interval.clamp_(0, K - 2)
        # k knots more on either side, so that every interval has its 2k neighbours; the functions that
        # would need the knots added here are dropped later.
        reach = torch.arange(1, k + 1, dtype=x.dtype, device=x.device)
        before = knots[:, :1] - (knots[:, 1:2] - knots[:, :1]) * reach.flip(0)
        after = knots[:, -1:] + (knots[:, -1:] - knots[:, -2:-1]) * reach
        padded = torch.cat([before, knots, after], 1)
        left = [flat - padded.gather(1, interval + k + 1 - j) for j in range(1, k + 1)]
        right = [padded.gather(1, interval + k + j) - flat for j in range(1, k + 1)]
        values = [torch.ones_like(flat)]
        slopes = values
        for j in range(1, k + 1):  # The NURBS Book, algorithm A2.2
            parts = [values[r] / (right[r] + left[j - r - 1]) for r in range(j)]
            zero = torch.zeros_like(flat)
            if j == k:
                slopes = [k * (before - after) for before, after in zip([zero, *parts], [*parts, zero], strict=True)]
            rising = [zero, *(left[j - r - 1] * part for r, part in enumerate(parts))]
            falling = [*(right[r] * part for r, part in enumerate(parts)), zero]
            values = [up + down for up, down in zip(rising, falling, strict=True)]
        back = [[v.t().reshape(x.shape) for v in group] for group in (values, slopes)]
        return (interval - k).t().reshape(x.shape), inside.t().reshape(x.shape), back[0], back[1]


def evaluate(knots: Tensor, order: int, coefficients: Tensor, x: Tensor) -> Tensor:
    """s_qp(x_q), every edge by itself: knots (Q,K), coefficients (F,Q,P), x (S,Q) -> (Q,S,P)."""
    features = KnotSpline(knots, order).features(x)  # (S,F,Q)
    return torch.einsum("sfq,fqp->qsp", features, coefficients)


def fit_coefficients(knots: Tensor, order: int, x: Tensor, y: Tensor) -> Tensor:
    """argmin_c Σ_s (Σ_f c_fqp B_f(x_sq) - y_qsp)², for each edge: x (S,Q), y (Q,S,P) -> (F,Q,P).

    The solution of least norm where samples leave some functions undetermined. Computed in float64 on the CPU.

    Raises ValueError for values that aren't finite.
    """
    if not y.isfinite().all():
        raise ValueError("the layer's coefficients have NaN or inf, which no splines can follow: load whole ones first")
    features = KnotSpline(knots.double().cpu(), order).features(x.double().cpu())  # (S,F,Q)
    solved = torch.linalg.lstsq(features.permute(2, 0, 1), y.double().cpu(), driver="gelsd").solution  # (Q,F,P)
    return solved.transpose(0, 1).to(y)
