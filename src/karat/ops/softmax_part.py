"""What basis attention is told when softmax attention over the same scores is wanted too."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SoftmaxPart:
    """softmax(S) v beside the sums over features of S: what it takes, and the memory that its results go to.

    The forward pass reads v and writes `attended` and `logsumexp`; the backward pass reads all of them and `grad`, and
    writes `dv`: with P = exp(S - logsumexp) and δ = Σ_d (attended ∘ grad),

        dV = Pᵀ grad,  dS = P ∘ (grad Vᵀ - δ) + what basis attention itself sends to S.
    """

    v: Tensor  # (B,H,N,Dv)
    attended: Tensor  # (B,H,M,Dv), last stride 1
    logsumexp: Tensor  # (B,H,M): log Σ_j exp S_ij in float32 or better; +inf in rows that see no key
    grad: Tensor | None = None  # (B,H,M,Dv)
    dv: Tensor | None = None  # (B,H,N,Dv) contiguous; None where not wanted

    def see_nothing(self) -> None:
        """Write the results where there is no query or no key."""
        if self.grad is None:
            self.attended.zero_()
            self.logsumexp.fill_(float("inf"))
        elif self.dv is not None:
            self.dv.zero_()

    def finish(self, rows: tuple[slice | int, ...], sums: Tensor, total: Tensor, top: Tensor) -> None:
        """Write results: sums (...,Dv) and total (...,1) of exp(S - top), top (...,1), for `rows` of (B,H,M)."""
        empty = total == 0
        self.attended[rows] = (sums / total.masked_fill(empty, 1)).to(self.attended.dtype)
        self.logsumexp[rows] = (top + total.log()).masked_fill(empty, float("inf")).squeeze(-1)

    def delta(self) -> Tensor:
        """δ (B,H,M,1), in the precision of `logsumexp`."""
        assert self.grad is not None
        dtype = self.logsumexp.dtype
        return (self.attended.to(dtype) * self.grad.to(dtype)).sum(-1, keepdim=True)
