"""What one attend is asked beside a Call and its u: values, the projector behind the sums, softmax beside them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from karat.basis.fourier import Fourier
from karat.ops.call import Call


class _Nothing(Fourier):
    """A family without features: φ = 0."""

    def __post_init__(self) -> None:
        """There is nothing to check."""

    def features(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)[..., :0, :]


NOTHING = _Nothing(grid=0)


class Projector(NamedTuple):
    """O = gate · (sums + places) (wᵀ v), and with `softmax` softmax(S) v added to it.

    v: values (B,H,N,Dv); w: (H,N,R), R the width of the sums; gate: (H,), or None for one. `factors`, (F,1,1) and (),
    multiply u and w, whose gradients are those of what was given; None where they are whole. places: (H,M,R), the same
    for all images, or None for zero.
    """

    v: Tensor
    w: Tensor
    gate: Tensor | None
    softmax: bool
    factors: tuple[Tensor, Tensor] | None = None
    places: Tensor | None = None

    def whole(self, u: Tensor) -> tuple[Tensor, Projector]:
        """u and itself, the factors multiplied in."""
        if self.factors is None:
            return u, self
        of_u, of_w = self.factors
        return u * of_u, self._replace(w=self.w * of_w, factors=None)


class Attended(NamedTuple):
    """What an attend gives, memory that is written to: O (B,H,M,Dv), laid out as (B,M,H,Dv), the order in which a model
    joins its heads; the sums and `places` (B,H,M,R), laid out as (B,H,R,M), or without features nothing; logsumexp
    (B,H,M) of softmax, or nothing."""

    out: Tensor
    sums: Tensor
    logsumexp: Tensor


ProjectedNeeds = tuple[bool, ...]  # which of the gradients for q, k, v, u, w, gate, places and bias are wanted


class ProjectedGradients(NamedTuple):
    """Gradients, each contiguous, in the shape and precision of what it is for; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    u: Tensor | None
    w: Tensor | None
    gate: Tensor | None
    places: Tensor | None
    bias: Tensor | None


def unmasked(call: Call, v: Tensor) -> Tensor:
    """v, zero where the mask of keys (B,H,1,N) drops the key: what stands there may be anything."""
    return v if call.mask is None else v.masked_fill(~call.mask.transpose(-2, -1), 0)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """x (B,H,·,·) times the gate (H,), or as it is."""
    return x if gate is None else x * gate.to(x.dtype)[:, None, None]
