"""Softmax over the scores of a tile, inside the kernels of basis attention: joint attention.

Tiles as in features.py; values b_v (BN,BV), gradients b_da (BM,BV). `b_keep` is False for keys beyond the end too, and
scores are zero wherever it is; a row that sees no key has +inf in `logsumexp`, so its probabilities are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from karat.ops.triton.functions import exp2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def running_softmax(b_sums, b_top, b_total, b_x, b_keep, b_v, PRECISION: tl.constexpr, SINE: tl.constexpr):
    """Σ_j exp(S_j - top) v_j, top and Σ_j exp(S_j - top), one tile of keys on."""
    b_x = tl.where(b_keep, b_x, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_x, 1))
    b_start = tl.where(b_new == float("-inf"), 0.0, b_new) * LOG2_E  # no key so far
    b_weights = exp2(b_x * LOG2_E - b_start[:, None], SINE)
    b_shrink = exp2(b_top * LOG2_E - b_start, SINE)
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
    b_x,
    b_keep,
    b_v,
    b_da,
    b_logsumexp,
    b_delta,
    HAS_MASK: tl.constexpr,
    WITH_DS: tl.constexpr,
    WITH_DV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    SINE: tl.constexpr,
):
    """Softmax's share of dS, and dV + Pᵀ dO (WITH_DV: where TRANSPOSED alone).

    Where TRANSPOSED and without a mask nothing needs care: keys beyond the end have rows of their own, which nobody
    reads, queries beyond it have dO = 0, δ = 0. Not so in rows of dS, where the product with K would sum them up.
    """
    b_logsumexp *= LOG2_E
    b_ds = tl.zeros(b_x.shape, tl.float32)
    if TRANSPOSED:
        b_p = exp2(b_x * LOG2_E - b_logsumexp[None, :], SINE)
        if HAS_MASK:
            b_p = tl.where(b_keep, b_p, 0.0)
        if WITH_DV:
            b_dv = tl.dot(b_p.to(b_da.dtype), b_da, b_dv, input_precision=PRECISION)
        if WITH_DS:
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_da), input_precision=PRECISION) - b_delta[None, :])
    else:
        b_p = tl.where(b_keep, exp2(b_x * LOG2_E - b_logsumexp[:, None], SINE), 0.0)
        b_ds = b_p * (tl.dot(b_da, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return b_ds, b_dv
