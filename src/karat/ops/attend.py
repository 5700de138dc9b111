"""The front door of one attend: basis attention, the projector that follows it, softmax beside it, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis
from karat.ops import attend_operator, reference
from karat.ops.call import Call
from karat.ops.checks import check_beside, checked
from karat.ops.products import low_rank_product
from karat.ops.projector import Projector, unmasked


def attend(call: Call, u: Tensor, basis: str | Basis, projector: Projector, impl: str = "auto") -> Tensor:
    """O = gate · Φ̂ (wᵀ v) [+ softmax(S) v],  Φ̂[b,h,i,r] = Σ_j mask_j φ(S_ij; u[h,:,j,r]): σ v in order W∘Φ (SPEC §8).

    Args:
        call: queries (B,H,M,D), keys (B,H,N,D), scale and bias of the scores S, and a mask of keys (B,H,1,N): what it
            drops adds exactly zero, whatever stands there in v and whatever finite number in k.
        u: parameters of the edge functions (H,F,N,R).
        basis: their family, or its spec; F = basis.num_parameters.
        projector: values v (B,H,N,Dv), w (H,N,R), gate (H,) or None, and whether softmax stands beside.
        impl: as in `karat.basis_attention`.

    Returns:
        (B,H,M,Dv) in q's dtype, laid out as (B,M,H,Dv), the order in which a model joins its heads. With softmax it's
        kept for the backward pass, as fused softmax attention keeps its own.

    Raises:
        ValueError: as `karat.basis_attention`; a mask of pairs; u or w of other sizes; w or gate elsewhere.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 3, 7, 8).unbind()
    >>> u, w = torch.randn(3, 6, 7, 4), torch.randn(3, 7, 4)
    >>> attend(Call(q, k, 0.3), u, "fourier(grid=3)", Projector(v, w, None, False)).shape
    torch.Size([2, 3, 7, 8])
    """
    call, v, basis, impl = checked(call, projector.v, u, basis, impl)
    assert v is not None
    _, w, gate, softmax, factors = projector
    _check(call, u, w, gate, factors)
    if factors is not None and (impl == "reference" or {x.dtype for x in (u, w, *factors)} != {torch.float32}):
        u, projector = projector.whole(u)
        w, factors = projector.w, None
    if impl == "reference":
        with reference.full_precision(call.q):
            return _by_definition(call, u, basis, projector._replace(v=v))
    q, k, scale, bias, mask = call
    out: Tensor = attend_operator.attend(q, k, v, u, w, gate, bias, mask, basis, scale, impl, softmax, factors=factors)
    return out


def _check(call: Call, u: Tensor, w: Tensor, gate: Tensor | None, factors: tuple[Tensor, Tensor] | None) -> None:
    if u.dim() != 4 or w.shape != (*u.shape[:1], *u.shape[2:]):
        raise ValueError(f"u must be (H,F,N,R) and w (H,N,R), got {tuple(u.shape)} and {tuple(w.shape)}")
    if gate is not None and gate.shape != u.shape[:1]:
        raise ValueError(f"gate must have a number for each of {len(u)} heads, got {tuple(gate.shape)}")
    of_u, of_w = factors or (None, None)
    if of_u is not None and of_w is not None and (of_u.shape != (u.shape[1], 1, 1) or of_w.dim()):
        raise ValueError(
            f"factors must be (F,1,1) of u with F={u.shape[1]} and () of w, got {tuple(of_u.shape)} and "
            f"{tuple(of_w.shape)}"
        )
    for name, x in (("w", w), ("gate", gate), ("the factor of u", of_u), ("the factor of w", of_w)):
        if x is not None:
            check_beside(call.q, x, name)
    if call.mask is not None and call.mask.shape[2] != 1:
        raise ValueError(
            f"attend takes a mask of keys, (B,H,1,N), got {tuple(call.mask.shape)}: under a mask of pairs σ isn't "
            "Φ̂ wᵀ, use basis_attention"
        )


def _by_definition(call: Call, u: Tensor, basis: Basis, projector: Projector) -> Tensor:
    v, w, gate, softmax, _ = projector
    v = unmasked(call, v)
    attended, sums = None, None
    if softmax:
        attended, sums = reference.joint_attention(call, v, u, basis)
    else:
        sums = reference.basis_attention(call, u, basis)
    out = low_rank_product(sums, w.to(v.dtype), v)
    if gate is not None:
        out = gate.to(out.dtype)[:, None, None] * out
    return out if attended is None else attended + out
