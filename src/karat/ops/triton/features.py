"""Bases that are linear in their parameters, inside a kernel: tiles of features against tiles of u (SPEC §8).

Two functions for a family: `*_contract` adds Σ_f ψ_f(S) U_f to the output tile, `*_differentiate` gives
dS = Σ_f ψ_f'(S) ∘ (dO U_fᵀ) and adds ψ_f(S)ᵀ dO to the tiles of dU. Features exist one at a time. Loops over
harmonics are unrolled, as are those that add to dU: accumulators can't be indexed at run time. Those over splines
are not, as the compiler would keep all of their independent products in flight, beyond its registers.

Tiles: scores b_x, b_keep (BM,BN), or (BN,BM) where TRANSPOSED; b_do (BM,BE); rows of u_f at p_u (BN,) + f · s_f,
masked by m_n. Whatever lies off the tensors' ends needs no care here: u and dO are loaded as zero there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from karat.ops.triton.functions import activation, activation_slope, sincos


@triton.jit
def load_u(p_u, s_f, m_n, f, like):
    """u_f (BN,BE), BE the width of `like`."""
    o_e = tl.arange(0, like.shape[1])
    return tl.load(p_u[:, None] + f * s_f + o_e[None, :], mask=m_n[:, None], other=0.0)


@triton.jit
def spread(b_do, b_u, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """dψ_f = dO U_fᵀ in the scores' orientation."""
    if TRANSPOSED:
        return tl.dot(b_u, tl.trans(b_do), input_precision=PRECISION)
    else:
        return tl.dot(b_do, tl.trans(b_u), input_precision=PRECISION)


@triton.jit
def add_feature(b_out, b_psi, b_u, PRECISION: tl.constexpr):
    """out + ψ_f U_f."""
    return tl.dot(b_psi.to(b_u.dtype), b_u, b_out, input_precision=PRECISION)


@triton.jit
def add_outer(b_du, b_psi, b_do, PRECISION: tl.constexpr):
    """dU_f + ψ_fᵀ dO, with ψ_f transposed already."""
    return tl.dot(b_psi.to(b_do.dtype), b_do, b_du, input_precision=PRECISION)


@triton.jit
def base_contract(
    b_out, b_x, b_keep, p_u, s_f, m_n, BASE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr
):
    b_psi = activation(b_x, BASE)
    if HAS_MASK:
        b_psi = tl.where(b_keep, b_psi, 0.0)
    return add_feature(b_out, b_psi, load_u(p_u, s_f, m_n, 0, b_out), PRECISION)


@triton.jit
def base_differentiate(
    b_du,
    b_x,
    b_keep,
    b_do,
    p_u,
    s_f,
    m_n,
    BASE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DS: tl.constexpr,
    WITH_DU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_ds = tl.zeros(b_x.shape, tl.float32)
    if WITH_DS:
        b_ds = activation_slope(b_x, BASE) * spread(b_do, load_u(p_u, s_f, m_n, 0, b_do), TRANSPOSED, PRECISION)
    if WITH_DU:
        b_psi = activation(b_x, BASE)
        if HAS_MASK:
            b_psi = tl.where(b_keep, b_psi, 0.0)
        b_du = add_outer(b_du, b_psi, b_do, PRECISION)
    return b_ds, b_du


@triton.jit
def fourier_start(b_x, b_keep, HAS_MASK: tl.constexpr, SINE: tl.constexpr):
    """cos and sin of 1x, again, and of 0x. Masked ones are zero, and `fourier_next` keeps them so."""
    b_c, b_s = sincos(b_x, SINE)
    b_c0 = tl.full(b_x.shape, 1.0, tl.float32)
    b_s0 = tl.zeros(b_x.shape, tl.float32)
    if HAS_MASK:
        b_c = tl.where(b_keep, b_c, 0.0)
        b_s = tl.where(b_keep, b_s, 0.0)
        b_c0 = tl.where(b_keep, b_c0, 0.0)
    return b_c, b_s, b_c, b_s, b_c0, b_s0


@triton.jit
def fourier_next(b_c1, b_s1, b_c, b_s, b_c0, b_s0, G: tl.constexpr):
    """cos and sin of (m+1)x from those of x, mx and (m-1)x: by a recurrence, whose error grows with m² about 0.

    For more than five harmonics by the sum of two angles, at two products more.
    """
    if G > 5:
        return b_c * b_c1 - b_s * b_s1, b_s * b_c1 + b_c * b_s1, b_c, b_s
    else:
        return 2.0 * b_c1 * b_c - b_c0, 2.0 * b_c1 * b_s - b_s0, b_c, b_s


@triton.jit
def fourier_contract(
    b_out,
    b_x,
    b_keep,
    p_u,
    s_f,
    m_n,
    FIRST_F: tl.constexpr,
    SETTINGS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    SINE: tl.constexpr,
):
    G: tl.constexpr = SETTINGS[0]
    b_c1, b_s1, b_c, b_s, b_c0, b_s0 = fourier_start(b_x, b_keep, HAS_MASK, SINE)
    for m in tl.static_range(G):
        b_out = add_feature(b_out, b_c, load_u(p_u, s_f, m_n, FIRST_F + m, b_out), PRECISION)
        b_out = add_feature(b_out, b_s, load_u(p_u, s_f, m_n, FIRST_F + G + m, b_out), PRECISION)
        b_c, b_s, b_c0, b_s0 = fourier_next(b_c1, b_s1, b_c, b_s, b_c0, b_s0, G)
    return b_out


@triton.jit
def fourier_differentiate(
    du,
    b_ds,
    b_x,
    b_keep,
    b_do,
    p_u,
    s_f,
    m_n,
    FIRST_F: tl.constexpr,
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
    """dS added to b_ds, and dU of the harmonics FIRST, ..., FIRST + COUNT - 1: (cos, sin, cos, sin, ...)."""
    G: tl.constexpr = SETTINGS[0]
    b_c1, b_s1, b_c, b_s, b_c0, b_s0 = fourier_start(b_x, b_keep, HAS_MASK, SINE)
    new = ()
    for m in tl.static_range(G):
        if WITH_DS:  # cos(mx)' = -m sin(mx), sin(mx)' = m cos(mx)
            b_dcos = spread(b_do, load_u(p_u, s_f, m_n, FIRST_F + m, b_do), TRANSPOSED, PRECISION)
            b_dsin = spread(b_do, load_u(p_u, s_f, m_n, FIRST_F + G + m, b_do), TRANSPOSED, PRECISION)
            b_ds += (m + 1.0) * (b_c * b_dsin - b_s * b_dcos)
        if WITH_DU:
            if m >= FIRST and m < FIRST + COUNT:
                new = new + (add_outer(du[2 * (m - FIRST)], b_c, b_do, PRECISION),)
                new = new + (add_outer(du[2 * (m - FIRST) + 1], b_s, b_do, PRECISION),)
        b_c, b_s, b_c0, b_s0 = fourier_next(b_c1, b_s1, b_c, b_s, b_c0, b_s0, G)
    return b_ds, new


@triton.jit
def spline(b_t, ORDER: tl.constexpr):
    """The B-spline of the knots 0, 1, ..., k+1 and its slope at t, k = ORDER.

    1/k! Σ_j (-1)^j C(k+1,j) (t-j)₊^k. The function is even about (k+1)/2: the left half alone is summed, where
    fewer terms cancel.
    """
    END: tl.constexpr = ORDER + 1
    b_left = tl.minimum(b_t, END - b_t, propagate_nan=tl.PropagateNan.ALL)
    b_value = tl.zeros(b_t.shape, tl.float32)
    b_slope = tl.zeros(b_t.shape, tl.float32)
    # (-1)^j C(k+1,j) / k!, and the power k-1 and k of what is positive of t - j
    factor = 1.0
    for i in tl.static_range(2, ORDER + 1):
        factor = factor / i
    for j in tl.static_range((ORDER + 1) // 2 + 1):
        b_past = tl.maximum(b_left - j, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_power = tl.where(b_left > j, 1.0, 0.0)
        for _ in tl.static_range(ORDER - 1):
            b_power *= b_past
        b_slope += (factor * ORDER) * b_power
        b_value += factor * (b_power * b_past)
        factor = -factor * (ORDER + 1 - j) / (j + 1)
    return b_value, tl.where(b_t * 2.0 > END, -b_slope, b_slope)


@triton.jit
def bspline_position(b_x, SETTINGS: tl.constexpr):
    """x in knot spacings from the first extended knot, and spacings in a unit of x."""
    GRID: tl.constexpr = SETTINGS[0]
    RANGE: tl.constexpr = SETTINGS[2]
    DENSITY: tl.constexpr = GRID / (2.0 * RANGE)
    return (b_x + RANGE) * DENSITY + SETTINGS[1]


@triton.jit
def bspline_contract(
    b_out,
    b_x,
    b_keep,
    p_u,
    s_f,
    m_n,
    FIRST_F: tl.constexpr,
    SETTINGS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_t = bspline_position(b_x, SETTINGS)
    for i in range(SETTINGS[0] + SETTINGS[1]):
        b_psi, _ = spline(b_t - i, SETTINGS[1])
        if HAS_MASK:
            b_psi = tl.where(b_keep, b_psi, 0.0)
        b_out = add_feature(b_out, b_psi, load_u(p_u, s_f, m_n, FIRST_F + i, b_out), PRECISION)
    return b_out


@triton.jit
def bspline_differentiate(
    du,
    b_x,
    b_keep,
    b_do,
    p_u,
    s_f,
    m_n,
    FIRST_F: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DS: tl.constexpr,
    WITH_DU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS, and dU of the functions FIRST, ..., FIRST + COUNT - 1."""
    DENSITY: tl.constexpr = SETTINGS[0] / (2.0 * SETTINGS[2])
    b_t = bspline_position(b_x, SETTINGS)
    b_ds = tl.zeros(b_x.shape, tl.float32)
    if WITH_DS:
        for i in range(SETTINGS[0] + SETTINGS[1]):
            _, b_slope = spline(b_t - i, SETTINGS[1])
            b_ds += b_slope * spread(b_do, load_u(p_u, s_f, m_n, FIRST_F + i, b_do), TRANSPOSED, PRECISION)
    new = ()
    if WITH_DU:
        for i in tl.static_range(COUNT):
            b_psi, _ = spline(b_t - (FIRST + i), SETTINGS[1])
            if HAS_MASK:
                b_psi = tl.where(b_keep, b_psi, 0.0)
            new = new + (add_outer(du[i], b_psi, b_do, PRECISION),)
    return b_ds * DENSITY, new
