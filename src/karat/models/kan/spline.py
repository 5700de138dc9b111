"""The B-spline KAN layer: a learnable spline on every edge, on grids that can be refined and moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from karat.basis import ACTIVATIONS, LinearBasis
from karat.basis.base import check_count, check_positive
from karat.basis.bspline import BSpline
from karat.models.kan.feature_linear import feature_linear
from karat.models.kan.initial import mean_square
from karat.models.kan.knots import KnotSpline, adaptive_knots, check_apart, evaluate, fit_coefficients, uniform_knots
from karat.models.tracing import one_node

# Share of the layer's initial output variance that comes from the splines; the base activation has the rest, as
# in pykan, whose splines start as small noise.
_SPLINE_SHARE = 0.1


class SplineLinear(nn.Module):
    """y_p = Σ_q w_pq b(x_q) + Σ_q Σ_f c_fqp B_f(x_q) (Liu et al., arXiv 2404.19756, eq. 2.10).

    The B_f are the G + k splines of degree k = `order` on `grid` intervals (`karat.basis.BSpline`); every input has
    its own knots, [-range, range] at first. The output's variance is 1 at the start for inputs from N(0,1).

    While all grids have equal steps only the k + 1 functions that aren't zero are evaluated, in closed form, and
    nothing of size F·Q is kept for the backward pass.

    Args:
        in_features: Q.
        out_features: P.
        grid: G, the number of intervals.
        order: k, the degree.
        range: the first grids are [-range, range].
        base: b, a key of `karat.basis.ACTIVATIONS`, or "zero".

    Parameters: `coefficients` (F,Q,P), `base_weight` (P,Q) unless base="zero". Buffer: `knots` (Q, G+2k+1).

    Raises ValueError for a value out of range.

    >>> layer = SplineLinear(4, 2, grid=5)
    >>> layer(torch.randn(3, 7, 4)).shape
    torch.Size([3, 7, 2])
    """

    knots: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid: int = 8,
        order: int = 3,
        range: float = 4.0,
        base: str = "silu",
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check_count("SplineLinear", name, value, 1)
        check_count("SplineLinear", "grid", grid, 1)
        check_count("SplineLinear", "order", order, 1)
        check_positive("SplineLinear", "range", range)
        if base not in ("zero", *ACTIVATIONS):
            raise ValueError(f"unknown base activation {base!r}; choose one of zero, {', '.join(ACTIVATIONS)}")
        self.in_features, self.out_features = in_features, out_features
        self.grid, self.order, self.base = grid, order, base
        low = torch.full((in_features,), -float(range))
        self.register_buffer("knots", uniform_knots(low, -low, grid, order))
        self.coefficients = nn.Parameter(torch.empty(grid + order, in_features, out_features))
        self.base_weight = None if base == "zero" else nn.Parameter(torch.empty(out_features, in_features))
        self._uniform, self._seen = True, _state(self.knots)
        self.register_load_state_dict_post_hook(_look_after_loading)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew; the knots stay. Does nothing on the meta device."""
        if self.knots.is_meta:
            return
        share = 1.0 if self.base_weight is None else _SPLINE_SHARE
        basis = KnotSpline(self.knots[:1].double().cpu(), self.order)
        power = mean_square(lambda x: basis.features(x.unsqueeze(-1)).squeeze(-1).t()).sum().item()
        nn.init.normal_(self.coefficients, std=math.sqrt(share / (self.in_features * max(power, 1e-6))))
        if self.base_weight is not None:
            power = mean_square(ACTIVATIONS[self.base].value).item()
            nn.init.normal_(self.base_weight, std=math.sqrt((1 - share) / (self.in_features * power)))

    @property
    def uniform(self) -> bool:
        """Whether every grid has equal steps, so that the closed form serves.

        Knots that were written to since are looked at again. Compiled code can't be relied on to do so, nor can
        torch.export: after writing to knots other than by load_state_dict or update_grid, read `uniform` once first.
        """
        self._look_at_knots()
        return self._uniform

    # torch.compile calls it while it traces and guards what it finds; torch.export shows it no values, see the hook
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
    def _look_at_knots(self) -> None:
        state = _state(self.knots)
        if state is None or state == self._seen:
            return
        steps = self.knots.double().diff(dim=1)
        rounding = torch.finfo(self.knots.dtype).eps * self.knots.abs().amax().double()  # bfloat16 knots too
        self._uniform = bool((steps - steps.mean(1, keepdim=True)).abs().amax() <= 1e-5 * steps.amax() + rounding)
        self._seen = state

    def splines(self, x: Tensor) -> Tensor:
        """The splines' part alone, Σ_q Σ_f c_fqp B_f(x_q): (...,Q) -> (...,P)."""
        if not self.uniform:
            basis: LinearBasis = KnotSpline(self.knots, self.order)
            return feature_linear(x, self.coefficients, basis)
        # In steps of each grid, from its middle: one basis on [-G/2, G/2] serves all inputs.
        first, last = self.knots[:, self.order], self.knots[:, -1 - self.order]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        position = (x - (first + last) / 2) * (self.grid / (last - first))
        return feature_linear(position, self.coefficients, BSpline(self.grid, self.order, self.grid / 2))

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """(...,Q) -> (...,P)."""
        out = self.splines(x)
        if self.base_weight is None:
            return out
        return out + nn.functional.linear(ACTIVATIONS[self.base].value(x), self.base_weight)

    @torch.no_grad()
    def refine(self, factor: int) -> None:
        """Cut each interval into `factor` equal ones; the layer's function on the grids' range stays the same.

        The finer splines contain the coarser ones there; beyond the range, where both fade out, they end sooner.
        `coefficients` becomes a new, larger parameter (G·factor + k), frozen if it was: give it to the optimiser.
        (pykan's grid extension is the same step with a fit to samples.)

        Raises ValueError unless `factor` is a whole number >= 1, for knots that would coincide in the layer's dtype, or
        coefficients that aren't finite. The layer stays what it was.
        """
        check_count("refine", "factor", factor, 1)
        old, k = self.knots.double(), self.order
        inner = old[:, k : k + self.grid + 1]
        steps = torch.arange(factor, dtype=old.dtype, device=old.device) / factor
        cut = (inner[:, :-1, None] + inner.diff(dim=1)[..., None] * steps).flatten(1)  # (Q, G·factor)
        cut = torch.cat([cut, inner[:, -1:]], 1)
        mean = (cut[:, -1:] - cut[:, :1]) / (self.grid * factor)
        reach = torch.arange(1, k + 1, dtype=old.dtype, device=old.device)
        knots = torch.cat([cut[:, :1] - mean * reach.flip(0), cut, cut[:, -1:] + mean * reach], 1)
        if not self.uniform:
            check_apart(knots, self.knots.dtype, f"give less than factor={factor}, or refine the layer in float32")
        # k+1 points inside each interval determine a piecewise polynomial of degree k: the fit is exact.
        points = (torch.arange(k + 1, dtype=old.dtype, device=old.device) + 0.5) / (k + 1)
        x = (cut[:, :-1, None] + cut.diff(dim=1)[..., None] * points).flatten(1).t()
        y = evaluate(old, k, self.coefficients.double(), x)
        fitted = fit_coefficients(knots, k, x, y)
        self.coefficients = nn.Parameter(fitted.to(self.coefficients), self.coefficients.requires_grad)
        self.knots = knots.to(self.knots)
        self.grid *= factor

    @torch.no_grad()
    def update_grid(self, samples: Tensor, adaptive: float = 0.0) -> None:
        """Move each input's grid to the range of its samples (...,Q) and refit the splines there.

        The new coefficients are the least-squares optimum on the samples: of all splines on the new knots the one
        nearest to the old, edge by edge. `adaptive` moves the knots from equal steps (0) towards the samples'
        quantiles (1 isn't allowed: equal samples would give equal knots); other than 0 costs the fast path.

        Raises ValueError for an `adaptive` outside [0, 1), fewer than two samples, samples or coefficients that aren't
        finite, and knots that the layer's dtype can't hold or tell apart. The layer stays what it was.
        """
        if not 0 <= adaptive < 1:
            raise ValueError(f"adaptive must lie in [0, 1), got {adaptive!r}")
        if samples.shape[-1:] != (self.in_features,):
            raise ValueError(f"samples must be (...,{self.in_features}), got {tuple(samples.shape)}")
        x = samples.reshape(-1, self.in_features).double()
        if len(x) < 2:
            raise ValueError(f"a grid can't be moved to {len(x)} sample; give a batch")
        bad = int((~x.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(x)} samples have NaN or inf, to which no grid can be moved; leave them out, "
                "samples[samples.isfinite().all(-1)]"
            )
        y = evaluate(self.knots.double(), self.order, self.coefficients.double(), x)
        knots = adaptive_knots(x, self.grid, self.order, adaptive, self.knots.dtype)
        if not knots.to(self.knots).isfinite().all():
            raise ValueError(
                f"samples from {x.min():g} to {x.max():g} are too far apart for knots in {self.knots.dtype}"
            )
        if adaptive:  # equal steps need their ends alone
            check_apart(knots, self.knots.dtype, f"give less than adaptive={adaptive}, or move the layer in float32")
        self.coefficients.copy_(fit_coefficients(knots, self.order, x, y))
        self.knots.copy_(knots)
        self._look_at_knots()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, order={self.order}, base={self.base}"


def _look_after_loading(layer: SplineLinear, incompatible: object) -> None:
    layer._look_at_knots()  # what is exported or already compiled can't look by itself


def _state(knots: Tensor) -> tuple[int, int] | None:
    """What changes when the knots are replaced or written to; None while they have no values (meta, fake)."""
    if type(knots) is not Tensor or knots.is_meta:
        return None
    return knots.data_ptr(), 0 if knots.is_inference() else knots._version
