"""Kernels of the backward pass that sum over images: dK with dU, and the gradient of an additive bias.

See kernels.py for the letters and for why sums are cut as they are. The batch is cut into S ranges of images;
each program walks through one of them and writes its own partial result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from karat.ops.triton.functions import afresh
from karat.ops.triton.kernels import accumulators, differentiate, feature_of, load_rows, score
from karat.ops.triton.softmax import softmax_backward


@triton.jit
def place(program, N, H, BN: tl.constexpr):
    """A program's block of keys, head and range of images."""
    blocks = tl.cdiv(N, BN)
    return program % blocks, (program // blocks % H).to(tl.int64), (program // blocks // H).to(tl.int64)


@triton.jit(do_not_specialize=["B", "IMAGES"])  # a last batch of another size is no other kernel
def basis_attention_bwd_dkdu_kernel(
    q, k, u, v, bias, mask, do, da, logsumexp, delta, dk, du, dv, scale, B, H, M, N, IMAGES,
    s_q, s_k, s_u, s_v, s_bias, s_mask, s_do, s_da, s_dk, s_dv,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    WITH_DV: tl.constexpr,
    FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, WITH_DK: tl.constexpr, WITH_DU: tl.constexpr,
    PRECISION: tl.constexpr, SINE: tl.constexpr,
):  # fmt: skip
    """dK of one key block of one head in IMAGES images, one after the other, and dU (S,H,F,N,E) summed over them.

    dU stays in registers until the last image, so there is one write for each program instead of one for each image.
    SLOTS features at a time fit; FIRST and COUNT say which. Scores are transposed, (BN,BM): the features are then
    the left factor of ψᵀ dO, which the tensor cores take from registers.
    """
    i_n, i_h, i_s = place(tl.program_id(0), N, H, BN)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    b_du = accumulators(SLOTS, BN, BE)
    first = (i_s * IMAGES).to(tl.int32)
    for i_b0 in range(first, tl.minimum(first + IMAGES, B)):
        i_b = tl.cast(i_b0, tl.int64)
        i_n, i_h, i_s = place(afresh(tl.program_id(0), SINE), N, H, BN)
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        p_q = q + i_b * s_q[0] + i_h * s_q[1]
        p_do = do + i_b * s_do[0] + i_h * s_do[1]
        p_u = u + i_b * s_u[0] + i_h * s_u[1] + o_n * BE
        p_bias = bias + i_b * s_bias[0] + i_h * s_bias[1]
        p_mask = mask + i_b * s_mask[0] + i_h * s_mask[1]
        b_k = load_rows(k + i_b * s_k[0] + i_h * s_k[1], s_k[2], o_n, m_n, D, BD, s_k[3])
        b_dk = tl.zeros((BN, BD), tl.float32)
        if SOFTMAX:
            o_v = tl.arange(0, BV)
            p_da = da + i_b * s_da[0] + i_h * s_da[1]
            b_v = load_rows(v + i_b * s_v[0] + i_h * s_v[1], s_v[2], o_n, m_n, DV, BV, s_v[3])
            b_dv = tl.zeros((BN, BV), tl.float32)
        for start in range(0, M, BM):
            o_m = start + tl.arange(0, BM)
            m_m = o_m < M
            b_q = load_rows(p_q, s_q[2], o_m, m_m, D, BD, s_q[3])
            b_do = load_rows(p_do, s_do[2], o_m, m_m, E, BE, s_do[3])
            b_x, b_keep = score(
                b_q, b_k, p_bias, p_mask, s_bias, s_mask, start, i_n * BN, m_m, m_n, scale,
                HAS_BIAS, HAS_MASK, True, PRECISION,
            )  # fmt: skip
            b_ds = tl.zeros((BN, BM), tl.float32)
            if SOFTMAX:
                b_da = load_rows(p_da, s_da[2], o_m, m_m, DV, BV, s_da[3])
                b_logsumexp = tl.load(logsumexp + (i_b * H + i_h) * M + o_m, mask=m_m, other=0.0)
                b_delta = tl.load(delta + (i_b * H + i_h) * M + o_m, mask=m_m, other=0.0)
                b_ds, b_dv = softmax_backward(
                    b_dv, b_x, b_keep, b_v, b_da, b_logsumexp, b_delta,
                    HAS_MASK, WITH_DK, WITH_DV, True, PRECISION, SINE,
                )  # fmt: skip
            b_ds, b_du = differentiate(
                b_du, b_ds, b_x, b_keep, b_do, p_u, s_u[2], m_n,
                E, F, FAMILY, BASE, SETTINGS, FIRST, COUNT, HAS_MASK, WITH_DK, WITH_DU, True, PRECISION, SINE,
            )  # fmt: skip
            if WITH_DK:
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        i_n, i_h, i_s = place(afresh(tl.program_id(0), SINE), N, H, BN)
        i_b = tl.cast(afresh(i_b0, SINE), tl.int64)
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        if WITH_DK:
            p_dk = dk + i_b * s_dk[0] + i_h * s_dk[1] + o_n[:, None] * s_dk[2] + o_d[None, :] * s_dk[3]
            tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])
        if SOFTMAX:
            if WITH_DV:
                p_dv = dv + i_b * s_dv[0] + i_h * s_dv[1] + o_n[:, None] * s_dv[2] + o_v[None, :] * s_dv[3]
                tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_n[:, None] & (o_v < DV)[None, :])
    i_n, i_h, i_s = place(afresh(tl.program_id(0), SINE), N, H, BN)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < N
    for slot in tl.static_range(SLOTS):
        row = ((i_s * H + i_h) * F + feature_of(slot, FAMILY, BASE, SETTINGS, FIRST)) * N
        p_du = du + row * E + o_n[:, None] * E + o_e[None, :]
        tl.store(p_du, b_du[slot], mask=m_n[:, None] & (o_e < E)[None, :])


@triton.jit(do_not_specialize=["B", "IMAGES"])  # a last batch of another size is no other kernel
def basis_attention_bwd_dbias_kernel(
    q, k, u, v, bias, mask, do, da, logsumexp, delta, dbias, scale, B, H, M, N, IMAGES,
    s_q, s_k, s_u, s_v, s_bias, s_mask, s_do, s_da, s_dbias,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr, PRECISION: tl.constexpr, SINE: tl.constexpr,
):  # fmt: skip
    """dS of one pair of blocks of one head, summed over IMAGES images: dbias (S,H,M,N).

    SUM_M, SUM_N: the bias is the same for all queries, or keys; then the tile is summed along that axis, and the
    axis of dbias counts blocks.
    """
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_m, rest = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    i_n, rest = rest % blocks_n, rest // blocks_n
    i_h, i_s = (rest % H).to(tl.int64), (rest // H).to(tl.int64)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_b in range(i_s * IMAGES, tl.minimum((i_s + 1) * IMAGES, B)):
        b_q = load_rows(q + i_b * s_q[0] + i_h * s_q[1], s_q[2], o_m, m_m, D, BD, s_q[3])
        b_k = load_rows(k + i_b * s_k[0] + i_h * s_k[1], s_k[2], o_n, m_n, D, BD, s_k[3])
        b_do = load_rows(do + i_b * s_do[0] + i_h * s_do[1], s_do[2], o_m, m_m, E, BE, s_do[3])
        p_u = u + i_b * s_u[0] + i_h * s_u[1] + o_n * BE
        p_bias = bias + i_b * s_bias[0] + i_h * s_bias[1]
        p_mask = mask + i_b * s_mask[0] + i_h * s_mask[1]
        b_x, b_keep = score(
            b_q, b_k, p_bias, p_mask, s_bias, s_mask, i_m * BM, i_n * BN, m_m, m_n, scale,
            HAS_BIAS, HAS_MASK, False, PRECISION,
        )  # fmt: skip
        b_ds = tl.zeros((BM, BN), tl.float32)
        if SOFTMAX:
            b_v = load_rows(v + i_b * s_v[0] + i_h * s_v[1], s_v[2], o_n, m_n, DV, BV, s_v[3])
            b_da = load_rows(da + i_b * s_da[0] + i_h * s_da[1], s_da[2], o_m, m_m, DV, BV, s_da[3])
            b_logsumexp = tl.load(logsumexp + (i_b * H + i_h) * M + o_m, mask=m_m, other=0.0)
            b_delta = tl.load(delta + (i_b * H + i_h) * M + o_m, mask=m_m, other=0.0)
            b_ds, _ = softmax_backward(
                b_ds, b_x, b_keep, b_v, b_da, b_logsumexp, b_delta, HAS_MASK, True, False, False, PRECISION, SINE
            )
        b_ds, _ = differentiate(
            (), b_ds, b_x, b_keep, b_do, p_u, s_u[2], m_n,
            E, F, FAMILY, BASE, SETTINGS, 0, 0, HAS_MASK, True, False, False, PRECISION, SINE,
        )  # fmt: skip
        b_sum += b_ds
    p_dbias = dbias + i_s * s_dbias[0] + i_h * s_dbias[1]
    if SUM_M and SUM_N:
        tl.store(p_dbias + i_m.to(tl.int64) * s_dbias[2] + i_n, tl.sum(b_sum))
    elif SUM_M:
        tl.store(p_dbias + i_m.to(tl.int64) * s_dbias[2] + o_n, tl.sum(b_sum, 0), mask=m_n)
    elif SUM_N:
        tl.store(p_dbias + o_m.to(tl.int64) * s_dbias[2] + i_n, tl.sum(b_sum, 1), mask=m_m)
    else:
        p_dbias += o_m.to(tl.int64)[:, None] * s_dbias[2] + o_n[None, :]
        tl.store(p_dbias, b_sum, mask=m_m[:, None] & m_n[None, :])
