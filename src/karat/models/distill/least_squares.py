"""Least squares from second moments: ordinary, and with a bound on the rank. One problem a head, in float64.

The data are rows z (P,) and targets y (E,). What is kept of them are S = Σ z zᵀ and C = Σ z yᵀ, so they may be
streamed in any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over the rows seen so far: gram (H,P,P), cross (H,P,E), power (H,E,E) = Σ y yᵀ, rows."""

    gram: Tensor
    cross: Tensor
    power: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, heads: int, features: int, targets: int) -> Moments:
        """No rows yet."""

        def zero(rows: int, columns: int) -> Tensor:
            return torch.zeros(heads, rows, columns, dtype=torch.float64)

        return cls(zero(features, features), zero(features, targets), zero(targets, targets))

    def add(self, head: int, z: Tensor, y: Tensor) -> None:
        """Add rows z (rows,P) with targets y (rows,E) of one head."""
        z, y = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, y))  # sums of many rows
        for total, left, right in ((self.gram, z, z), (self.cross, z, y), (self.power, y, y)):
            total[head] += (left.T @ right).to(total)
        self.rows += len(z) if head == 0 else 0

    def without(self, fitted: Tensor) -> Tensor:
        """The cross moments of what `fitted` (H,P,E) leaves of the targets: Σ z (y - fittedᵀ z)ᵀ."""
        return self.cross - self.gram @ fitted

    def beside_last(self) -> Moments:
        """The moments of the other features, and of the targets, once the last feature is regressed out of them."""
        last = slice(-1, None)
        gain = self.gram[:, last, :] / self.gram[:, last, last].clamp(min=1e-30)  # (H,1,P)
        return Moments(
            (self.gram - gain.mT @ self.gram[:, last, :])[:, :-1, :-1],
            (self.cross - gain.mT @ self.cross[:, last])[:, :-1],
            self.power,
            self.rows,
        )

    def error(self, fitted: Tensor) -> Tensor:
        """Σ (y - fittedᵀ z)(y - fittedᵀ z)ᵀ, (H,E,E)."""
        explained = fitted.mT @ self.cross
        return self.power - explained - explained.mT + fitted.mT @ self.gram @ fitted


def least_squares(gram: Tensor, cross: Tensor, ridge: float = 0.0) -> Tensor:
    """argmin_β Σ |y - βᵀ z|² + λ|β|², from gram (...,P,P) and cross (...,P,E): (...,P,E).

    λ = ridge · mean of the gram's diagonal. With ridge = 0 the gram must have full rank.

    >>> z, y = torch.randn(2, 50, 4, dtype=torch.float64)
    >>> beta = least_squares(z.T @ z, z.T @ y)
    >>> torch.allclose(beta, torch.linalg.lstsq(z, y).solution)
    True
    """
    size = gram.shape[-1]
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # features that never vary (no spline is alive at any score) leave the gram singular: a floor at rounding's level
    loaded = gram + torch.eye(size, dtype=gram.dtype, device=gram.device) * level * max(ridge, 1e-13)
    factor, failed = torch.linalg.cholesky_ex(loaded)
    if bool(failed.any()):
        return torch.linalg.lstsq(loaded, cross).solution
    return torch.cholesky_solve(cross, factor)


def reduced_rank(
    gram: Tensor, cross: Tensor, rank: int, *, weight: Tensor | None = None, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """argmin over matrices W Kᵀ of rank R of Σ (y - W Kᵀ z)ᵀ G (y - W Kᵀ z): K (...,P,R) and W (...,E,R).

    Reduced-rank regression (Izenman 1975): the ordinary solution's fit, G^½ βᵀ z, is projected onto its R leading
    principal directions. `weight` is G (...,E,E), positive semidefinite; None is the identity.

    Columns of W are G-orthogonal, those of K carry the size. R may exceed E: the columns beyond are zero.
    """
    beta = least_squares(gram, cross, ridge)
    targets = cross.shape[-1]
    if weight is None:
        weight = torch.eye(targets, dtype=gram.dtype, device=gram.device).expand(*gram.shape[:-2], -1, -1)
    values, vectors = torch.linalg.eigh(weight)
    values = values.clamp(min=0)
    values = torch.maximum(values, 1e-9 * values.amax(-1, keepdim=True))  # directions without weight: any solution does
    root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
    inverse = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT
    fit = beta @ root  # (...,P,E)
    _, directions = torch.linalg.eigh(fit.mT @ gram @ fit)
    kept = directions.flip(-1)[..., :rank]  # eigh sorts upwards
    coefficients, output = fit @ kept, inverse @ kept
    missing = rank - kept.shape[-1]
    if missing > 0:
        pad = (0, missing)
        return torch.nn.functional.pad(coefficients, pad), torch.nn.functional.pad(output, pad)
    return coefficients, output
