"""Softmax over the scores of a tile, inside the kernels of basis attention: joint attention.

Tiles as in features.py; values b_v (BN,BV), gradients b_da (BM,BV). `b_keep` is False beyond the ends too, and
scores are zero wherever it is; a row that sees no key has +inf in `logsumexp`, so its probabilities are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def running_softmax(b_sums, b_top, b_total, b_x, b_keep, b_v, PRECISION: tl.constexpr):
    """Σ_j exp(S_j - top) v_j, top and Σ_j exp(S_j - top), one tile of keys on."""
    b_new = tl.maximum(b_top, tl.max(tl.where(b_keep, b_x, float("-inf")), 1))
    b_start = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key so far
    b_weights = tl.where(b_keep, tl.exp(b_x - b_start[:, None]), 0.0)
    b_shrink = tl.exp(b_top - b_start)
    b_total = b_total * b_shrink + tl.sum(b_weights, 1)
    b_sums = tl.dot(b_weights.to(b_v.dtype), b_v, b_sums * b_shrink[:, None], input_precision=PRECISION)
    return b_sums, b_new, b_total


@triton.jit
def finished_softmax(b_sums, b_top, b_total):
    """softmax(S) v and the scores' log-sum-exp."""
    b_empty = b_total == 0.0
    b_logsumexp = tl.where(b_empty, float("inf"), b_top + tl.log(tl.where(b_empty, 1.0, b_total)))
    return b_sums / tl.where(b_empty, 1.0, b_total)[:, None], b_logsumexp


@triton.jit
def softmax_backward(
    b_dv,
    b_ds,
    b_x,
    b_keep,
    b_v,
    b_da,
    b_logsumexp,
    b_delta,
    WITH_DS: tl.constexpr,
    WITH_DV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS with softmax's share in it, and dV + Pᵀ dO (WITH_DV: where TRANSPOSED alone)."""
    if TRANSPOSED:
        b_p = tl.where(b_keep, tl.exp(b_x - b_logsumexp[None, :]), 0.0)
        if WITH_DS:
            b_dp = tl.dot(b_v, tl.trans(b_da), input_precision=PRECISION) - b_delta[None, :]
            b_ds = b_ds + b_p * b_dp
        if WITH_DV:
            b_dv = tl.dot(b_p.to(b_da.dtype), b_da, b_dv, input_precision=PRECISION)
    else:
        b_p = tl.where(b_keep, tl.exp(b_x - b_logsumexp[:, None]), 0.0)
        b_dp = tl.dot(b_da, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None]
        b_ds = b_ds + b_p * b_dp
    return b_ds, b_dv
