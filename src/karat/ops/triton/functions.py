"""Elementwise functions of the kernels: sine and cosine from one evaluation, base activations.

The polynomials are minimax fits in f², |f| <= 1/2, of √2 sin(πf) (odd) and √2 cos(πf) (even). Half the angle is
reduced and doubled afterwards, cos 2a = 1 - 2 sin² a and sin 2a = 2 sin a cos a, so that no quadrant has to be
looked up: nothing but multiply-adds.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # it knows no assembler
INVERSE_TWO_PI = tl.constexpr(0.15915494309189535)
TWO_PI = tl.constexpr(6.283185307179586)
# 2π = A + B + C, where A has 8 and B 11 significant bits: the product with a whole number below 2^13 is exact.
TWO_PI_A = tl.constexpr(6.28125)
TWO_PI_B = tl.constexpr(0.0019350051879882812)
TWO_PI_C = tl.constexpr(3.0199159795074593e-07)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2^23: what is added to it and taken off again is a whole number


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN, which a chip's own minimum and maximum drop."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sincos(x, SINE: tl.constexpr):
    """(cos x, sin x). Largest error for |x| <= 1000 (it is tested), by what SINE names:

    "exact": 1e-6 absolute. "polynomial": 3e-5 + 1.2e-7 |x|, for half precision, whose own rounding is larger; the
    second part is what the rounding of a float32 score does anyway. "unit", NVIDIA's unit for such functions, after
    the angle is reduced: 2e-6 + 1.2e-7 |x| in half of the instructions.

    All stay within [-1, 1] (and rounding) for any finite x, or |x| <= 1e7 if not exact; beyond 1e6 a float32 score
    holds no angle any more.
    """
    if SINE == "unit":
        # not floor(): that is a function of the same unit, which takes a quarter of what multiply-adds take
        rest = x - ((x * INVERSE_TWO_PI + ROUNDING) - ROUNDING) * TWO_PI
        if INTERPRETED:
            return tl.cos(rest), tl.sin(rest)
        else:
            return tl.inline_asm_elementwise(
                "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;", "=f,=f,f", [rest],
                dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        turns = x * INVERSE_TWO_PI
        whole = tl.floor(turns + 0.5)
        if SINE == "exact":
            rest = ((x - whole * TWO_PI_A) - whole * TWO_PI_B) - whole * TWO_PI_C
            # A little over 1/2 where the rounding of `turns` chose the farther whole number; far out it chooses wildly.
            f = clamp(rest * INVERSE_TWO_PI, -0.51, 0.51)
            z = f * f
            sin = 3.6062889582355466 + z * (-0.8457635961989637 + z * 0.10920575372907101)
            sin = f * (4.442882834149948 + z * (-7.308241154547076 + z * sin))
            cos = -1.8882749991850378 + z * (0.3322518821844357 + z * -0.03450216749896511)
            cos = 1.4142135621 + z * (-6.978864110096111 + z * (5.739881545941813 + z * cos))
        else:
            tl.static_assert(SINE == "polynomial")
            f = turns - whole
            z = f * f
            sin = f * (
                4.442867903032942 + z * (-7.307443421343428 + z * (3.5947880790020985 + z * -0.7843740321195277))
            )
            cos = 1.4142040804693907 + z * (-6.977642056865008 + z * (5.715238395715443 + z * -1.7283486647946187))
        return 1.0 - sin * sin, sin * cos


@triton.jit
def afresh(i, SINE: tl.constexpr):
    """A block's index i, computed again: what follows from it isn't kept in registers through the loop before, or the
    loop around, where the compiler has none left and would spill them."""
    if SINE != "unit" or INTERPRETED:
        return i
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def exp2(x, SINE: tl.constexpr):
    """2 to the power of x; by NVIDIA's unit alone, without the four instructions that keep results below 2^-126."""
    if SINE != "unit" or INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activation(x, BASE: tl.constexpr):
    """b(x)."""
    if BASE == "identity":
        return x
    elif BASE == "silu":
        return x * sigmoid(x)
    else:
        tl.static_assert(BASE == "gelu")
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activation_slope(x, BASE: tl.constexpr):
    """b'(x)."""
    if BASE == "identity":
        return tl.full(x.shape, 1.0, tl.float32)
    elif BASE == "silu":
        share = sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    else:
        tl.static_assert(BASE == "gelu")
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
