"""The front door of one attend: basis attention, the projector that follows it, softmax beside it, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from karat.basis import Basis
from karat.ops import attend_operator, implementations, reference
from karat.ops.call import Call
from karat.ops.checks import check_beside, checked
from karat.ops.masks import softmax_attention
from karat.ops.products import FEW_TOKENS, low_rank_product, shared_product
from karat.ops.projector import NOTHING, Projector, gated, unmasked
from karat.ops.transforms import observed


def attend(call: Call, u: Tensor | None, basis: str | Basis | None, projector: Projector, impl: str = "auto") -> Tensor:
    """O = gate · Φ̂ (wᵀ v) [+ softmax(S) v],  Φ̂[b,h,i,r] = Σ_j mask_j φ(S_ij; u[h,:,j,r]) [+ places[h,i,r]]: σ v in
    order W∘Φ (SPEC §8), and beside softmax that of static mixing.

    Args:
        call: queries (B,H,M,D), keys (B,H,N,D), scale and bias of the scores S, and a mask of keys (B,H,1,N): what it
            drops adds exactly zero, whatever stands there in v and whatever finite number in k.
        u: parameters of the edge functions (H,F,N,R); None for none: Φ̂ is what stands in `places`.
        basis: their family, or its spec; F = basis.num_parameters.
        projector: values v (B,H,N,Dv), w (H,N,R), gate (H,) or None, whether softmax stands beside, places (H,M,R) or
            None.
        impl: as in `karat.basis_attention`. Without u a kernel is used where it can be, and gains: no other is named.

    Returns:
        (B,H,M,Dv) in q's dtype, laid out as (B,M,H,Dv), the order in which a model joins its heads. With softmax it's
        kept for the backward pass, as fused softmax attention keeps its own.

    Raises:
        ValueError: as `karat.basis_attention`; a mask of pairs; u, w or places of other sizes or elsewhere.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 3, 7, 8).unbind()
    >>> u, w = torch.randn(3, 6, 7, 4), torch.randn(3, 7, 4)
    >>> attend(Call(q, k, 0.3), u, "fourier(grid=3)", Projector(v, w, None, False)).shape
    torch.Size([2, 3, 7, 8])
    """
    w = projector.w
    if u is None:
        u, basis = w.new_empty((*w.shape[:1], 0, *w.shape[1:])), NOTHING
    assert basis is not None
    call, v, basis, impl = checked(call, projector.v, u, basis, impl, w, projector.gate, projector.places)
    assert v is not None
    projector = projector._replace(v=v)
    _, _, gate, softmax, factors, places = projector
    _check(call, u, projector)
    if not u.shape[1] and not _gains(call, u, basis, projector, impl):
        return _of_places(call, projector.whole(u)[1])
    if factors is not None and (impl == "reference" or {x.dtype for x in (u, w, *factors)} != {torch.float32}):
        u, projector = projector.whole(u)
        w, factors = projector.w, None
    if impl == "reference":
        with reference.full_precision(call.q):
            return _by_definition(call, u, basis, projector)
    q, k, scale, bias, mask = call
    tensors = (q, k, v, u, w, gate, places, bias, mask)
    out: Tensor = attend_operator.attend(*tensors, basis, scale, impl, softmax, factors=factors)
    return out


def _check(call: Call, u: Tensor, projector: Projector) -> None:
    _, w, gate, _, factors, places = projector
    if u.dim() != 4 or w.shape != (*u.shape[:1], *u.shape[2:]):
        raise ValueError(f"u must be (H,F,N,R) and w (H,N,R), got {tuple(u.shape)} and {tuple(w.shape)}")
    if gate is not None and gate.shape != u.shape[:1]:
        raise ValueError(f"gate must have a number for each of {len(u)} heads, got {tuple(gate.shape)}")
    if places is None and not u.shape[1]:
        raise ValueError("where u is None, places (H,M,R) must be given: there is nothing to sum")
    if places is not None and places.shape != (u.shape[0], call.q.shape[2], u.shape[3]):
        wanted = (u.shape[0], call.q.shape[2], u.shape[3])
        raise ValueError(f"places must be (H,M,R) = {wanted}, got {tuple(places.shape)}")
    of_u, of_w = factors or (None, None)
    if of_u is not None and of_w is not None and (of_u.shape != (u.shape[1], 1, 1) or of_w.dim()):
        raise ValueError(
            f"factors must be (F,1,1) of u with F={u.shape[1]} and () of w, got {tuple(of_u.shape)} and "
            f"{tuple(of_w.shape)}"
        )
    beside = {"w": w, "gate": gate, "places": places, "the factor of u": of_u, "the factor of w": of_w}
    for name, x in beside.items():
        if x is not None:
            check_beside(call.q, x, name)
    if call.mask is not None and call.mask.shape[2] != 1:
        raise ValueError(
            f"attend takes a mask of keys, (B,H,1,N), got {tuple(call.mask.shape)}: under a mask of pairs σ isn't "
            "Φ̂ wᵀ, use basis_attention"
        )


def _gains(call: Call, u: Tensor, basis: Basis, projector: Projector, impl: str) -> bool:
    """Whether a call without features goes on: to the definition, or to a kernel that is faster than softmax's own and
    two products. In bfloat16, which those multiply in, it is with few tokens alone."""
    (q, k, _, bias, mask), v = call, projector.v
    if impl == "reference":
        return not torch.compiler.is_exporting()
    if not projector.softmax:
        return False
    if observed(q, k, v, projector.w, projector.gate, projector.places, bias, mask):
        return False
    if 0 in (q.numel(), k.numel(), v.numel()) or (q.dtype == torch.bfloat16 and k.shape[2] > FEW_TOKENS):
        return False
    return implementations.projecting(impl, call, u, basis, v)


def _of_places(call: Call, projector: Projector) -> Tensor:
    """`attend` without features, in PyTorch."""
    (q, k, scale, bias, mask), (v, w, gate, softmax, _, places) = call, projector
    assert places is not None
    v = unmasked(call, v)
    out = gated(shared_product(places.to(v.dtype), shared_product(w.to(v.dtype).transpose(-2, -1), v)), gate)
    return softmax_attention(q, k, v, scale, bias, mask) + out if softmax else out


def _by_definition(call: Call, u: Tensor, basis: Basis, projector: Projector) -> Tensor:
    v, w, gate, softmax, _, places = projector
    v, attended = unmasked(call, v), None
    if softmax:
        attended, sums = reference.joint_attention(call, v, u, basis)
    else:
        sums = reference.basis_attention(call, u, basis)
    if places is not None:
        sums = sums + places.to(sums.dtype)
    out = gated(low_rank_product(sums, w.to(v.dtype), v), gate)
    return out if attended is None else attended + out
