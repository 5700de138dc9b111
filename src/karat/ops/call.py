"""What every way to the heavy operation is asked, from the front door to the kernels, and what it answers backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The scores of an attention, not formed yet: S = scale · q kᵀ + bias, and which of its pairs take part.

    q: queries (B,H,M,D); k: keys (B,H,N,D); bias, and mask (boolean, True = takes part): (B,H,M,N), where any axis may
    be 1, or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    mask: Tensor | None = None

    def scores(self) -> Tensor:
        """S (B,H,M,N), in the queries' precision; the mask isn't applied."""
        product = self.q @ self.k.transpose(-2, -1) * self.scale
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def wide(self) -> Call:
        """The same in float32, or better if it was."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return self._replace(
            q=self.q.to(dtype), k=self.k.to(dtype), bias=None if self.bias is None else self.bias.to(dtype)
        )


Needs = tuple[bool, bool, bool, bool]  # which of the gradients for q, k, u and bias are wanted


class Gradients(NamedTuple):
    """Gradients, each contiguous, in the shape and precision of what it is for; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    u: Tensor | None
    bias: Tensor | None


def no_gradients(call: Call, u: Tensor, needs: Needs) -> Gradients:
    """Zeros where there is no query, key or width: nothing is summed, so nothing comes back."""
    return Gradients(
        *(
            torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
            for x, need in zip((call.q, call.k, u, call.bias), needs, strict=True)
        )
    )
