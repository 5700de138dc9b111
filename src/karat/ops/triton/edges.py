"""Bases that are not linear in their parameters, inside a kernel: rational and wavelet edges.

Every edge (key j, output e) has a function of its own, so the scores' tile is loaded once and evaluated once for
each e, with the parameters of its keys as vectors. One function gives the value, the slope in x and the slopes in
the parameters; what a kernel doesn't use is never computed.

Tiles as in features.py: b_x (BM,BN), or (BN,BM) where TRANSPOSED; parameters of output e at
p_u (BN,) + f · s_f + e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from karat.ops.triton.functions import activation, activation_slope, clamp, sincos

LEAST_DILATION = tl.constexpr(1e-3)
PI = tl.constexpr(3.141592653589793)
MEXICAN_HAT = tl.constexpr(0.8673250705840776)  # 2 / (π^¼ √3)


@triton.jit
def power(x, N: tl.constexpr):
    """x^N, N >= 0."""
    out = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(N):
        out *= x
    return out


@triton.jit
def rational(x, p, FIRST: tl.constexpr, SETTINGS: tl.constexpr):
    """φ, φ', and the slopes in a_0, ..., a_m, b_1, ..., b_n. Monomials are divided by max(|x|,1)^n (SPEC §2)."""
    DEGREE: tl.constexpr = SETTINGS[0]
    UNDER: tl.constexpr = SETTINGS[1]
    w = tl.maximum(tl.abs(x), 1.0)
    v = 1.0 / w
    y = x * v
    lead = power(v, UNDER)  # x^0
    above, rise = tl.zeros(x.shape, tl.float32), tl.zeros(x.shape, tl.float32)
    inner, bend = tl.zeros(x.shape, tl.float32), tl.zeros(x.shape, tl.float32)
    terms = ()
    before = lead
    for i in tl.static_range(max(DEGREE, UNDER) + 1):
        if i <= UNDER:
            term = power(y, i) * power(v, UNDER - i)
        else:
            term = power(y, i) * power(w, i - UNDER)
        terms = terms + (term,)
        if i <= DEGREE:
            above += p[FIRST + i] * term
            if i > 0:
                rise += p[FIRST + i] * (i * before)
        if i > 0 and i <= UNDER:
            inner += p[FIRST + DEGREE + i] * term
            bend += p[FIRST + DEGREE + i] * (i * before)
        before = term
    share = 1.0 / (lead + tl.abs(inner))
    value = above * share
    fall = -value * tl.where(inner > 0, share, tl.where(inner < 0, -share, 0.0))
    slopes = ()
    for i in tl.static_range(DEGREE + 1):
        slopes = slopes + (share * terms[i],)
    for i in tl.static_range(1, UNDER + 1):
        slopes = slopes + (fall * terms[i],)
    return value, share * rise + fall * bend, slopes


@triton.jit
def gaussian(x):
    return tl.exp(-0.5 * x * x)


@triton.jit
def meyer_step(t):
    """ν(t) and its slope, t clamped to [0,1]."""
    t = clamp(t, 0.0, 1.0)
    squared, both = t * t, t * (1.0 - t)
    return squared * squared * (35.0 + t * (-84.0 + t * (70.0 - 20.0 * t))), 140.0 * both * both * both


@triton.jit
def meyer(x):
    size = clamp(tl.abs(x), 0.0, 1.0)
    step, step_slope = meyer_step(size)
    inner, inner_slope = meyer_step(2.0 * step - 1.0)
    window, bend = sincos(PI / 2 * inner, "exact")
    cos, sin = sincos(PI * size, "exact")
    slope = PI * cos * window - sin * (PI * bend * inner_slope) * step_slope
    return sin * window, tl.where(x > 0, slope, tl.where(x < 0, -slope, 0.0))


@triton.jit
def shannon(x, WINDOWED: tl.constexpr):
    END: tl.constexpr = 5 * PI
    inside = x
    if WINDOWED:
        inside = clamp(x, -END, END)
    cos, sin = sincos(inside, "exact")
    near = tl.abs(inside) < 0.05  # by the series there: the differences cancel
    apart = tl.where(near, 1.0, inside)
    squared = inside * inside
    sinc = tl.where(near, 1.0 - squared * (1.0 / 6) * (1.0 - squared * 0.05), sin / apart)
    slope = tl.where(near, inside * (squared * (1.0 / 30) - 1.0 / 3), (cos - sinc) / apart)
    if WINDOWED:
        wave, bend = sincos(inside * 0.2, "exact")
        window = 0.54 + 0.46 * wave
        slope = slope * window - sinc * (0.092 * bend)
        sinc = sinc * window
        outside = tl.abs(x) > END
        sinc = tl.where(outside, 0.0, sinc)
        slope = tl.where(outside, 0.0, slope)
    return sinc, slope


@triton.jit
def mother(x, FAMILY: tl.constexpr, SETTINGS: tl.constexpr):
    """The mother wavelet and its slope; formulas and their reading: karat.basis.wavelets."""
    if FAMILY == "mexican_hat":
        bell, squared = MEXICAN_HAT * gaussian(x), x * x
        return (squared - 1.0) * bell, x * (3.0 - squared) * bell
    elif FAMILY == "morlet":
        bell = gaussian(x)
        cos, sin = sincos(SETTINGS[0] * x, "exact")
        return cos * bell, -(SETTINGS[0] * sin + x * cos) * bell
    elif FAMILY == "dog":
        bell = gaussian(x)
        return x * bell, (1.0 - x * x) * bell
    elif FAMILY == "meyer":
        return meyer(x)
    else:
        tl.static_assert(FAMILY == "shannon")
        return shannon(x, SETTINGS[0])


@triton.jit
def wavelet(x, p, FIRST: tl.constexpr, FAMILY: tl.constexpr, SETTINGS: tl.constexpr):
    """φ, φ', and the slopes in w, τ, s."""
    weight, translation, dilation = p[FIRST], p[FIRST + 1], p[FIRST + 2]
    small = tl.abs(dilation) < LEAST_DILATION
    kept = tl.where(small, tl.where(dilation < 0, -LEAST_DILATION, LEAST_DILATION), dilation)
    moved = (x - translation) / kept
    value, slope = mother(moved, FAMILY, SETTINGS)
    dx = weight * slope / kept
    return weight * value, dx, (value, -dx, tl.where(small, 0.0, -dx * moved))


@triton.jit
def edge(x, p, FAMILY: tl.constexpr, BASE: tl.constexpr, SETTINGS: tl.constexpr):
    """φ(x), φ'(x), and the slopes in the parameters."""
    FIRST: tl.constexpr = 0 if BASE == "zero" else 1
    if FAMILY == "rational":
        value, dx, slopes = rational(x, p, FIRST, SETTINGS)
    else:
        value, dx, slopes = wavelet(x, p, FIRST, FAMILY, SETTINGS)
    if BASE != "zero":
        base = activation(x, BASE)
        value += p[0] * base
        dx += p[0] * activation_slope(x, BASE)
        slopes = (base,) + slopes
    return value, dx, slopes


@triton.jit
def load_parameters(p_u, s_f, m_n, e, F: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The F parameters of the edges (·, e), each along the keys' axis of the scores' tile."""
    p = ()
    for f in tl.static_range(F):
        b_p = tl.load(p_u + f * s_f + e, mask=m_n, other=0.0)
        if TRANSPOSED:
            p = p + (b_p[:, None],)
        else:
            p = p + (b_p[None, :],)
    return p


@triton.jit
def edges_contract(
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
):
    o_e = tl.arange(0, b_out.shape[1])
    for e in range(E):
        p = load_parameters(p_u, s_f, m_n, e, F, False)
        b_phi, _, _ = edge(b_x, p, FAMILY, BASE, SETTINGS)
        if HAS_MASK:
            b_phi = tl.where(b_keep, b_phi, 0.0)
        b_out += tl.where(o_e[None, :] == e, tl.sum(b_phi, 1)[:, None], 0.0)
    return b_out


@triton.jit
def edges_differentiate(
    du,
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
    HAS_MASK: tl.constexpr,
    WITH_DU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """dS = Σ_e φ'(S; u_e) ∘ dO_e and dU_f,e = Σ_i ∂φ/∂u_f ∘ dO_e, one evaluation per edge."""
    o_e = tl.arange(0, b_do.shape[1])
    b_ds = tl.zeros(b_x.shape, tl.float32)
    for e in range(E):
        p = load_parameters(p_u, s_f, m_n, e, F, TRANSPOSED)
        _, b_dx, slopes = edge(b_x, p, FAMILY, BASE, SETTINGS)
        b_column = tl.sum(tl.where(o_e[None, :] == e, b_do.to(tl.float32), 0.0), 1)
        if TRANSPOSED:
            b_dphi = tl.broadcast_to(b_column[None, :], b_x.shape)
        else:
            b_dphi = tl.broadcast_to(b_column[:, None], b_x.shape)
        if HAS_MASK:
            b_dphi = tl.where(b_keep, b_dphi, 0.0)
        b_ds += b_dx * b_dphi
        if WITH_DU:
            new = ()
            for f in tl.static_range(F):
                b_du = tl.sum(slopes[f] * b_dphi, 1)
                new = new + (du[f] + tl.where(o_e[None, :] == e, b_du[:, None], 0.0),)
            du = new
    return b_ds, du
