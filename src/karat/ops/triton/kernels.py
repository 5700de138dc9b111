"""Basis attention in a kernel: the output and dQ. (dK, dU and the bias are in kernels_sums.py.)

SOFTMAX: with softmax attention to v over the same scores, as `karat.ops.joint_attention` has it.

Scores and features of a tile live in registers; nothing of size M·N is written. No sum crosses programs but
through partial results that are added in a fixed order afterwards (dU over the batch), so there are no atomics and
two runs agree to the bit.

The backward pass recomputes the scores twice, for dQ and for dK with dU. One pass over both would have to pass dQ
between key blocks, by atomics (order not fixed) or through float32 partial results of dQ: at N = 197 their traffic
takes as long as the second recomputation (2·MN·(2D + FE) multiply-adds a head), and at N = 3137 they'd fill the memory.

Letters as in SPEC §8; i_ block index, o_ offsets, m_ masks, b_ tiles, p_ pointers, s_ strides. Strides are tuples,
0 along broadcast axes; u is packed: its last axis has length BE, zero beyond E, and stride 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from karat.ops.triton.edges import edges_contract, edges_differentiate
from karat.ops.triton.features import (
    base_contract,
    base_differentiate,
    bspline_contract,
    bspline_differentiate,
    fourier_contract,
    fourier_differentiate,
)
from karat.ops.triton.functions import afresh
from karat.ops.triton.softmax import finished_softmax, running_softmax, softmax_backward


@triton.jit
def load_rows(p, s_row, o, m, D: tl.constexpr, BD: tl.constexpr, s_d):
    """Rows o of a matrix: (len(o), BD), zero beyond the ends."""
    o_d = tl.arange(0, BD)
    return tl.load(p + o[:, None] * s_row + o_d[None, :] * s_d, mask=m[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def pairs(p, start_m, start_n, s, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to a tile of the (M,N) matrix at p with strides s[2], s[3].

    Its corner takes a 64-bit offset; within the tile 32 bits do, which saves half of the registers.
    """
    p += tl.cast(start_m, tl.int64) * s[2] + tl.cast(start_n, tl.int64) * s[3]
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    if TRANSPOSED:
        return p + (o_m[None, :] * s[2] + o_n[:, None] * s[3])
    else:
        return p + (o_m[:, None] * s[2] + o_n[None, :] * s[3])


@triton.jit
def score(
    b_q,
    b_k,
    p_bias,
    p_mask,
    s_bias,
    s_mask,
    start_m,
    start_n,
    m_m,
    m_n,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scores' tile and which pairs take part; other pairs' scores are 0, whatever q, k, bias are.

    Without a mask that's a row or a column: keys within the end. What stands in queries beyond it isn't stored.
    """
    BM: tl.constexpr = b_q.shape[0]
    BN: tl.constexpr = b_k.shape[0]
    if TRANSPOSED:
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        m_pair, b_keep = m_n[:, None] & m_m[None, :], m_n[:, None]
    else:
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        m_pair, b_keep = m_m[:, None] & m_n[None, :], m_n[None, :]
    if HAS_BIAS:
        p_tile = pairs(p_bias, start_m, start_n, s_bias, BM, BN, TRANSPOSED)
        b_x += tl.load(p_tile, mask=m_pair, other=0.0).to(tl.float32)
    if HAS_MASK:
        p_tile = pairs(p_mask, start_m, start_n, s_mask, BM, BN, TRANSPOSED)
        b_keep = tl.load(p_tile, mask=m_pair, other=0) != 0
        b_x = tl.where(b_keep, b_x, 0.0)
    return b_x, b_keep


@triton.jit
def contract(
    b_out,
    b_x,
    b_keep,
    p_u,
    s_f,
    m_n,
    E: tl.constexpr,
    F: tl.constexpr,
    FAMILY: tl.constexpr,
    BASE: tl.constexpr,
    SETTINGS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    SINE: tl.constexpr,
):
    """out + Σ_f ψ_f(S) U_f, or Σ_j φ(S; u_j) for edges that aren't linear in u. p_u (BN,): rows of f = 0."""
    if FAMILY != "fourier" and FAMILY != "bspline":
        return edges_contract(b_out, b_x, b_keep, p_u, s_f, m_n, E, F, FAMILY, BASE, SETTINGS, HAS_MASK)
    else:
        FIRST_F: tl.constexpr = 0 if BASE == "zero" else 1
        if BASE != "zero":
            b_out = base_contract(b_out, b_x, b_keep, p_u, s_f, m_n, BASE, HAS_MASK, PRECISION)
        if FAMILY == "fourier":
            return fourier_contract(b_out, b_x, b_keep, p_u, s_f, m_n, FIRST_F, SETTINGS, HAS_MASK, PRECISION, SINE)
        else:
            return bspline_contract(b_out, b_x, b_keep, p_u, s_f, m_n, FIRST_F, SETTINGS, HAS_MASK, PRECISION)


@triton.jit
def differentiate(
    du,
    b_ds,
    b_x,
    b_keep,
    b_do,
    p_u,
    s_f,
    m_n,
    E: tl.constexpr,
    F: tl.constexpr,
    FAMILY: tl.constexpr,
    BASE: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DS: tl.constexpr,
    WITH_DU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    SINE: tl.constexpr,
):
    """dS (float32) added to b_ds, and the tiles of dU that `accumulators` began, one step on.

    Added from the first, as what waits for the end takes registers until then.
    """
    if FAMILY != "fourier" and FAMILY != "bspline":
        b_more, du = edges_differentiate(
            du, b_x, b_keep, b_do, p_u, s_f, m_n, E, F, FAMILY, BASE, SETTINGS, HAS_MASK, WITH_DU, TRANSPOSED
        )
        b_ds += b_more
    else:
        FIRST_F: tl.constexpr = 0 if BASE == "zero" else 1
        WITH_BASE: tl.constexpr = BASE != "zero" and FIRST == 0
        rest = du[1:] if WITH_DU and WITH_BASE else du
        if FAMILY == "fourier":
            b_ds, new = fourier_differentiate(
                rest, b_ds, b_x, b_keep, b_do, p_u, s_f, m_n, FIRST_F, SETTINGS, FIRST, COUNT,
                HAS_MASK, WITH_DS, WITH_DU, TRANSPOSED, PRECISION, SINE,
            )  # fmt: skip
        else:
            b_more, new = bspline_differentiate(
                rest, b_x, b_keep, b_do, p_u, s_f, m_n, FIRST_F, SETTINGS, FIRST, COUNT,
                HAS_MASK, WITH_DS, WITH_DU, TRANSPOSED, PRECISION,
            )  # fmt: skip
            b_ds += b_more
        if WITH_BASE:
            b_du0 = du[0] if WITH_DU else b_ds
            b_ds0, b_du0 = base_differentiate(
                b_du0, b_x, b_keep, b_do, p_u, s_f, m_n, BASE, HAS_MASK, WITH_DS, WITH_DU, TRANSPOSED, PRECISION
            )
            b_ds += b_ds0
            new = (b_du0,) + new
        du = new
    if HAS_MASK:
        b_ds = tl.where(b_keep, b_ds, 0.0)
    return b_ds, du


@triton.jit
def accumulators(NUMBER: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
    """A tile of zeros for each feature whose dU the program sums up."""
    du = ()
    for _ in tl.static_range(NUMBER):
        du = du + (tl.zeros((BN, BE), tl.float32),)
    return du


@triton.jit
def feature_of(
    slot: tl.constexpr, FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr, FIRST: tl.constexpr
):
    """Which feature the accumulator number `slot` belongs to; Fourier's come as cos, sin, cos, sin, ..."""
    if BASE != "zero" and FIRST == 0 and slot == 0:
        return 0
    else:
        FIRST_F: tl.constexpr = 0 if BASE == "zero" else 1
        place: tl.constexpr = slot - FIRST_F if FIRST == 0 else slot
        if FAMILY == "fourier":
            return FIRST_F + FIRST + place // 2 + (place % 2) * SETTINGS[0]
        else:
            return FIRST_F + FIRST + place


@triton.jit
def basis_attention_fwd_kernel(
    q, k, u, v, bias, mask, out, attended, logsumexp, scale, H, M, N,
    s_q, s_k, s_u, s_v, s_bias, s_mask, s_out, s_attended,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, SINE: tl.constexpr,
):  # fmt: skip
    """out of one query block of one image and head. Neighbouring programs share k and u through the cache."""
    blocks = tl.cdiv(M, BM)
    i_m, i_bh = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_q = load_rows(q + i_b * s_q[0] + i_h * s_q[1], s_q[2], o_m, m_m, D, BD, s_q[3])
    p_k = k + i_b * s_k[0] + i_h * s_k[1]
    p_u = u + i_b * s_u[0] + i_h * s_u[1]
    p_bias = bias + i_b * s_bias[0] + i_h * s_bias[1]
    p_mask = mask + i_b * s_mask[0] + i_h * s_mask[1]
    b_out = tl.zeros((BM, BE), tl.float32)
    if SOFTMAX:
        p_v = v + i_b * s_v[0] + i_h * s_v[1]
        b_sums = tl.zeros((BM, BV), tl.float32)
        b_top, b_total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < N
        b_k = load_rows(p_k, s_k[2], o_n, m_n, D, BD, s_k[3])
        b_x, b_keep = score(
            b_q, b_k, p_bias, p_mask, s_bias, s_mask, i_m * BM, start, m_m, m_n, scale,
            HAS_BIAS, HAS_MASK, False, PRECISION,
        )  # fmt: skip
        if SOFTMAX:
            b_v = load_rows(p_v, s_v[2], o_n, m_n, DV, BV, s_v[3])
            b_sums, b_top, b_total = running_softmax(b_sums, b_top, b_total, b_x, b_keep, b_v, PRECISION, SINE)
        b_out = contract(
            b_out, b_x, b_keep, p_u + o_n * BE, s_u[2], m_n,
            E, F, FAMILY, BASE, SETTINGS, HAS_MASK, PRECISION, SINE,
        )  # fmt: skip
    o_m, o_e = afresh(i_m, SINE) * BM + tl.arange(0, BM), tl.arange(0, BE)
    m_m = o_m < M
    p_out = out + i_b * s_out[0] + i_h * s_out[1] + o_m[:, None] * s_out[2] + o_e[None, :] * s_out[3]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_e < E)[None, :])
    if SOFTMAX:
        b_attended, b_logsumexp = finished_softmax(b_sums, b_top, b_total)
        tl.store(logsumexp + i_bh * M + o_m, b_logsumexp, mask=m_m)
        o_v = tl.arange(0, BV)
        p_attended = attended + i_b * s_attended[0] + i_h * s_attended[1]
        p_attended += o_m[:, None] * s_attended[2] + o_v[None, :] * s_attended[3]
        tl.store(p_attended, b_attended.to(attended.dtype.element_ty), mask=m_m[:, None] & (o_v < DV)[None, :])


@triton.jit
def basis_attention_bwd_dq_kernel(
    q, k, u, v, bias, mask, do, da, logsumexp, delta, dq, scale, H, M, N,
    s_q, s_k, s_u, s_v, s_bias, s_mask, s_do, s_da, s_dq,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, SINE: tl.constexpr,
):  # fmt: skip
    """dQ of one query block of one image and head."""
    blocks = tl.cdiv(M, BM)
    i_m, i_bh = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_q = load_rows(q + i_b * s_q[0] + i_h * s_q[1], s_q[2], o_m, m_m, D, BD, s_q[3])
    b_do = load_rows(do + i_b * s_do[0] + i_h * s_do[1], s_do[2], o_m, m_m, E, BE, s_do[3])
    p_k = k + i_b * s_k[0] + i_h * s_k[1]
    p_u = u + i_b * s_u[0] + i_h * s_u[1]
    p_bias = bias + i_b * s_bias[0] + i_h * s_bias[1]
    p_mask = mask + i_b * s_mask[0] + i_h * s_mask[1]
    b_dq = tl.zeros((BM, BD), tl.float32)
    if SOFTMAX:
        p_v = v + i_b * s_v[0] + i_h * s_v[1]
        b_da = load_rows(da + i_b * s_da[0] + i_h * s_da[1], s_da[2], o_m, m_m, DV, BV, s_da[3])
        b_logsumexp = tl.load(logsumexp + i_bh * M + o_m, mask=m_m, other=0.0)
        b_delta = tl.load(delta + i_bh * M + o_m, mask=m_m, other=0.0)
    for start in range(0, N, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < N
        b_k = load_rows(p_k, s_k[2], o_n, m_n, D, BD, s_k[3])
        b_x, b_keep = score(
            b_q, b_k, p_bias, p_mask, s_bias, s_mask, i_m * BM, start, m_m, m_n, scale,
            HAS_BIAS, HAS_MASK, False, PRECISION,
        )  # fmt: skip
        b_ds = tl.zeros((BM, BN), tl.float32)
        if SOFTMAX:
            b_v = load_rows(p_v, s_v[2], o_n, m_n, DV, BV, s_v[3])
            b_ds, _ = softmax_backward(
                b_ds, b_x, b_keep, b_v, b_da, b_logsumexp, b_delta, HAS_MASK, True, False, False, PRECISION, SINE
            )
        b_ds, _ = differentiate(
            (), b_ds, b_x, b_keep, b_do, p_u + o_n * BE, s_u[2], m_n,
            E, F, FAMILY, BASE, SETTINGS, 0, 0, HAS_MASK, True, False, False, PRECISION, SINE,
        )  # fmt: skip
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    o_m, o_d = afresh(i_m, SINE) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_m = o_m < M
    p_dq = dq + i_b * s_dq[0] + i_h * s_dq[1] + o_m[:, None] * s_dq[2] + o_d[None, :] * s_dq[3]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_m[:, None] & (o_d < D)[None, :])
