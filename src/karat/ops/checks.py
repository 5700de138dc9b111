"""What both front doors do first: shapes, dtypes, broadcasts, and the autocast rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from karat.basis import Basis, parse_basis
from karat.ops.implementations import IMPLEMENTATIONS

IMPLS = ("auto", "reference", *IMPLEMENTATIONS)


class Inputs(NamedTuple):
    """Checked inputs: four axes everywhere, q, k and v in the precision of the products."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    basis: Basis
    scale: float
    bias: Tensor | None
    mask: Tensor | None


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    u: Tensor,
    basis: str | Basis,
    scale: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    impl: str,
) -> Inputs:
    """The inputs as the implementations take them. Raises ValueError for those that don't fit."""
    basis = parse_basis(basis) if isinstance(basis, str) else basis
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    q, k, v = _autocast(q, k, v)
    _check(q, k, u, basis)
    if v is not None:
        _check_values(k, v, u)
    bias = None if bias is None else _four_axes(bias, "bias", q, k)
    mask = None if mask is None else _four_axes(mask, "mask", q, k)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = takes part), got {mask.dtype}; write mask > threshold")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Inputs(q, k, v, basis, factor, bias, mask)


def _autocast(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The autocast rule: factors of products with q, k and v go to the low precision; sums stay in float32.

    Before the dtypes are compared: a norm of q and k that autocast leaves in float32 may stand beside v in bfloat16.
    """
    given = (q, k) if v is None else (q, k, v)
    kinds = {x.dtype for x in given}
    castable = torch.float64 not in kinds and all(kind.is_floating_point for kind in kinds)
    if not (castable and torch.is_autocast_enabled(q.device.type)):
        return q, k, v
    low = torch.get_autocast_dtype(q.device.type)
    return q.to(low), k.to(low), None if v is None else v.to(low)


def _check(q: Tensor, k: Tensor, u: Tensor, basis: Basis) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be (B,H,M,D) and k (B,H,N,D) with equal B, H, D; got {tuple(q.shape)} and {tuple(k.shape)}"
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


def _four_axes(x: Tensor, name: str, q: Tensor, k: Tensor) -> Tensor:
    full = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to (B,H,M,N) = {full}, got {tuple(x.shape)}")
    return x.reshape(shape)


def _check_values(k: Tensor, v: Tensor, u: Tensor) -> None:
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (B,H,N,Dv) with the B, H, N of k, {tuple(k.shape)}; got {tuple(v.shape)}")
    if v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v must have k's dtype and device, {k.dtype} on {k.device}; got {v.dtype} on {v.device}")
    if 0 in (k.shape[3], v.shape[3], u.shape[-1]):
        raise ValueError(
            f"joint attention needs widths D, Dv and E of at least 1, got {k.shape[3]}, {v.shape[3]}, {u.shape[-1]}"
        )
