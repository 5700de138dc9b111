"""What both front doors do first: shapes, dtypes, broadcasts, and the autocast rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis, parse_basis
from karat.ops.call import Call
from karat.ops.implementations import IMPLEMENTATIONS
from karat.ops.masks import as_mask
from karat.ops.reference import autocasting
from karat.ops.transforms import serving

IMPLS = ("auto", "reference", *IMPLEMENTATIONS)


class Checked(NamedTuple):
    """Inputs that fit: four axes everywhere, q, k and v in the precision of the products; and what serves them."""

    call: Call
    v: Tensor | None
    basis: Basis
    impl: str


def call_of(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None, mask: Tensor | None) -> Call:
    """What a front door was given, as a Call that isn't checked yet; scale None means 1/√D.

    Raises ValueError for a scale that is learned, as it would get no gradient, or more than one number.
    """
    if isinstance(scale, Tensor) and (scale.requires_grad or scale.numel() != 1):
        raise ValueError(
            f"scale must be a number without a gradient, got a tensor {tuple(scale.shape)}; multiply q by it, scale=1"
        )
    usual = q.shape[-1] ** -0.5 if scale is None and q.dim() and q.shape[-1] else 1.0
    return Call(q, k, usual if scale is None else float(scale), bias, mask)


def checked(call: Call, v: Tensor | None, u: Tensor, basis: str | Basis, impl: str, *others: Tensor | None) -> Checked:
    """The inputs, beside which `others` stand, as implementations take them. Raises ValueError if they don't fit."""
    basis = parse_basis(basis)
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    call, v = _autocast(call, v)
    _check(call.q, call.k, u, basis)
    if v is not None:
        check_values(call.q, call.k, v)
        if 0 in (v.shape[3], u.shape[-1]):
            raise ValueError(f"v and u need widths Dv and E of at least 1, got {v.shape[3]} and {u.shape[-1]}")
    full = (*call.q.shape[:3], call.k.shape[2])
    call = call._replace(bias=of_pairs("bias", call.bias, full, call.q), mask=of_pairs("mask", call.mask, full, call.q))
    return Checked(call, v, basis, serving(impl, call.q, call.k, v, u, call.bias, *others))


def _autocast(call: Call, v: Tensor | None) -> tuple[Call, Tensor | None]:
    """The autocast rule: factors of products with q, k and v go to the low precision; sums stay in float32.

    Before the dtypes are compared: a norm of q and k that autocast leaves in float32 may stand beside v in bfloat16.
    """
    if not autocasting(call.q):
        return call, v
    kinds = {x.dtype for x in (call.q, call.k, v) if x is not None}
    castable = torch.float64 not in kinds and all(dtype.is_floating_point for dtype in kinds)
    if not castable:
        return call, v
    low = torch.get_autocast_dtype(call.q.device.type)
    return call._replace(q=call.q.to(low), k=call.k.to(low)), None if v is None else v.to(low)


def _check(q: Tensor, k: Tensor, u: Tensor, basis: Basis) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or not q.shape[3]:
        raise ValueError(
            "q must be (B,H,M,D) and k (B,H,N,D) with equal B, H and D, D at least 1; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, H, N = q.shape[0], q.shape[1], k.shape[2]
    shared = (H, basis.num_parameters, N)
    if u.dim() not in (4, 5) or u.shape[-4:-1] != shared or (u.dim() == 5 and u.shape[0] != B):
        raise ValueError(
            f"u must be (H,F,N,E) or (B,H,F,N,E) with B={B}, H={H}, F={basis.num_parameters} ({basis}), N={N}; "
            f"got {tuple(u.shape)}"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype and u.is_floating_point()):
        raise ValueError(
            f"q, k and u must be floating point, q and k of one dtype; got {q.dtype}, {k.dtype}, {u.dtype}"
        )
    if not q.device == k.device == u.device:
        raise ValueError(f"q, k and u must be on one device; got {q.device}, {k.device}, {u.device}")


def of_pairs(name: str, x: Tensor | None, full: tuple[int, ...], q: Tensor) -> Tensor | None:
    """A bias or mask with four axes. Raises ValueError for one that isn't of pairs (B,H,M,N) = full, beside q."""
    whole = as_mask(x)
    if x is None or whole is None:
        return None
    if whole.dim() != 4 or any(size not in (1, most) for size, most in zip(whole.shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to (B,H,M,N) = {full}, got {tuple(x.shape)}")
    if name == "mask" and x.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = takes part), got {x.dtype}; write mask > threshold")
    check_beside(q, whole, name)
    return whole


def check_beside(q: Tensor, x: Tensor, name: str) -> None:
    """Raise ValueError where x is on another device than q, whose memory a kernel can't read, or complex."""
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}; move it with .to()")
    if x.is_complex():
        raise ValueError(f"{name} must be real, got {x.dtype}; take its .real")


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where q, k and v can't be those of one attention."""
    if not q.dim() == k.dim() == v.dim() == 4 or v.shape[:3] != k.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"v must be (B,H,N,Dv) beside q (B,H,M,D) and k (B,H,N,D); q, k and v are {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        places = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q and v must have k's dtype and device; q, k and v are {places}")
