"""What may happen to the R sums Φ̂(A)_k of each query between the edge functions and W, as tables by setting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # under the root: a query that sees no key has sums of zero and keeps them


def root_mean_square(hidden: Tensor) -> Tensor:
    """Each query's sums (...,R) divided by √(their mean square + 1e-6).

    >>> root_mean_square(torch.tensor([3.0, 4.0])).square().mean()
    tensor(1.0000)
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # squares overflow float16 early
    return (wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()).to(hidden.dtype)


# normalise=...
NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {"rms": root_mean_square}

# position=...: sums (B,H,M,R) and the term of each query's place, C (H,M,R); see `karat.operator.initialise`.
POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "query": lambda hidden, C: hidden + C,
    "gain": lambda hidden, C: hidden * (1 + C),
}


def shaped(hidden: Tensor, normalise: str | None, position: str | None, C: Tensor | None) -> Tensor:
    """The sums (B,H,M,R) normalised, then with the query's place in them, as the settings say."""
    if normalise is not None:
        hidden = NORMALISATIONS[normalise](hidden)
    if position is not None:
        assert C is not None
        hidden = POSITIONS[position](hidden, C.to(hidden.dtype))
    return hidden
