"""Basis attention and joint attention by their definition: eager, short, differentiable any number of times (SPEC §8).

Everything is materialised, features of size M·N·F included: this is what the other implementations must equal,
and the path for second derivatives and for export.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from karat.basis import Basis, LinearBasis
from karat.ops.call import Call
from karat.ops.masks import safe_softmax


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where x lies; tensors without numbers have none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off where it's on: the low precision is that of q and k; every sum after them is in float32."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


def contract(scores: Tensor, u: Tensor, basis: Basis, mask: Tensor | None = None) -> Tensor:
    """out[b,h,i,e] = Σ_j mask_ij φ(scores_ij; u[:,j,e]).

    scores (B,H,M,N), u (H,F,N,E) or (B,H,F,N,E), mask broadcastable to (B,H,M,N), True = takes part.
    Returns (B,H,M,E).
    """
    if mask is not None:  # before the functions too, so that a masked score may be anything, inf and NaN included
        scores = torch.where(mask, scores, 0)
    if isinstance(basis, LinearBasis):
        features = basis.features(scores)  # (B,H,M,F,N)
        if mask is not None:
            features = torch.where(mask.unsqueeze(-2), features, 0)
        return features.flatten(-2) @ u.flatten(-3, -2)  # (B,H,M,F·N) (H,F·N,E)
    packed = u.movedim(-3, 0).unsqueeze(-3)  # (F,[B,]H,1,N,E)
    edges = basis.edge(scores.unsqueeze(-1), packed)  # (B,H,M,N,E)
    if mask is not None:
        edges = torch.where(mask.unsqueeze(-1), edges, 0)
    return edges.sum(-2)


def basis_attention(call: Call, u: Tensor, basis: Basis) -> Tensor:
    """See `karat.basis_attention`. Half precision is computed in float32."""
    scores = call.wide().scores()
    return contract(scores, u.to(scores.dtype), basis, call.mask).to(call.q.dtype)


def joint_attention(call: Call, v: Tensor, u: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """See `karat.ops.joint_attention`. Half precision is computed in float32."""
    scores = call.wide().scores()
    if call.mask is not None:  # softmax's backward pass would carry a NaN of a masked score along
        scores = torch.where(call.mask, scores, 0)
    attended = safe_softmax(scores, call.mask) @ v.to(scores.dtype)
    return attended.to(call.q.dtype), contract(scores, u.to(scores.dtype), basis, call.mask).to(call.q.dtype)
