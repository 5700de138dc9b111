"""Attention alone, q, k, v -> O, forward and backward, every way side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator
from karat.ops.call import Call
from karat.ops.implementations import IMPLEMENTATIONS, load
from karat.study.bench import paper_way
from karat.study.bench.timing import Timing, alternate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """B images, H heads, N tokens, head dim D."""

    B: int = 8
    H: int = 12
    N: int = 197
    D: int = 64


def eager_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√D) v in three operations."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def flash_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√D) v by the flash path alone (a GPU, half precision)."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def ways(
    shape: AttentionShape, attention: str, device: str, dtype: torch.dtype, *, materialised: bool = True
) -> dict[str, Attend]:
    """Softmax both ways, the paper's way, and every implementation of ours that can serve the call."""
    candidates: dict[str, Attend] = {"softmax eager": eager_softmax, "softmax SDPA": F.scaled_dot_product_attention}
    if device == "cuda" and dtype != torch.float32:
        candidates["softmax flash"] = flash_softmax
    config = KArAtConfig.parse(attention)
    if materialised and not paper_way.missing(config):
        op = KArAtOperator(shape.H, shape.N, config).to(device, dtype)
        candidates["paper's way"] = partial(paper_way.attend, op)
    probe = torch.empty(shape.B, shape.H, 1, shape.D, device=device, dtype=dtype)
    call = Call(probe, probe, 1.0)
    for impl in IMPLEMENTATIONS:
        if impl == "triton" and device == "cpu":  # it may be served there, by an interpreter
            continue
        op = KArAtOperator(shape.H, shape.N, KArAtConfig.parse(f"{attention},impl={impl}")).to(device, dtype)
        if not config.has_edges:  # nothing to choose an implementation for
            candidates["karat"] = op.attend
            break
        u = op.edge_layers[0].packed()
        if load(impl).unsupported(call, u, config.edge_basis) is None:
            candidates[f"karat {impl}"] = op.attend
    return candidates


def forward_backward(attend: Attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    """One pass each way, gradients thrown away."""
    q.grad = k.grad = v.grad = None
    attend(q, k, v).backward(grad)


def forward_only(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    """One forward pass without a graph."""
    with torch.no_grad():
        attend(q, k, v)


def measure(
    shape: AttentionShape,
    attention: str,
    *,
    rounds: int = 31,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = True,
    materialised: bool = True,
) -> dict[str, Timing]:
    """Seconds of each way for this shape; `attention` is KArAt's short name, "g3b" and the like."""
    q, k, v, grad = torch.randn(4, shape.B, shape.H, shape.N, shape.D, device=device, dtype=dtype).unbind()
    for x in (q, k, v):
        x.requires_grad_(backward)
    run = partial(forward_backward, grad=grad) if backward else forward_only
    candidates = {
        name: partial(run, attend, q, k, v)
        for name, attend in ways(shape, attention, device, dtype, materialised=materialised).items()
    }
    return alternate(candidates, rounds)
