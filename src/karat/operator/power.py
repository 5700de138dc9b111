"""How strong edges and places are over scores of unit variance: integrated, not estimated, where edges see scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from karat.basis import LinearBasis
from karat.operator.edges import EdgeLayer
from karat.operator.rates import NODES, REACH

CHUNK_NUMBERS = 1 << 22
SAMPLES = 4096


def edge_moments(
    layer: EdgeLayer, inputs: Callable[[Tensor], Tensor] | None = None, *, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    """E[y_p] (H,P) and E[y_p y_r] (H,P,P), or its diagonal (H,P), for y_p = Σ_q φ_pq(x_q).

    The x_q are independent, functions of standard normal z: (nodes,1,1) -> (nodes,1,1) or (nodes,H,Q); z itself if
    not given. By the trapezoidal rule: spectrally accurate for smooth functions times a Gaussian.
    """
    u = layer.packed().double().transpose(0, 1)  # (F,H,Q,P)
    z = torch.linspace(-REACH, REACH, NODES, dtype=u.dtype, device=u.device)
    weights = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * (2 * REACH / (NODES - 1))
    x = z[:, None, None] if inputs is None else inputs(z[:, None, None])
    product = "hp" if diagonal else "hpr"
    second_axis = "p" if diagonal else "r"
    if x.numel() == NODES and isinstance(layer.basis, LinearBasis):
        # Moments of the features suffice, whatever the number of edges.
        psi = torch.stack(layer.basis.feature_list(x.flatten()))  # (F,nodes)
        first = torch.einsum("f,fhqp->hqp", psi @ weights, u)
        mixed = torch.einsum("fg,fhqp->ghqp", psi * weights @ psi.t(), u)
        second = torch.einsum(f"fhqp,fhq{second_axis}->{product}", mixed, u)
        return _with_means(first, second, diagonal)
    x = x.expand(NODES, u.shape[1], u.shape[2])
    nodes = max(1, CHUNK_NUMBERS // u[0].numel())
    first, second = u.new_zeros(u.shape[1:]), u.new_zeros(())
    for some, weight in zip(x.split(nodes), weights.split(nodes), strict=True):
        phi = layer.basis.edge(some.unsqueeze(-1), u.unsqueeze(1))  # (nodes,H,Q,P)
        first = first + torch.einsum("g,ghqp->hqp", weight, phi)
        second = second + torch.einsum(f"g,ghqp,ghq{second_axis}->{product}", weight, phi, phi)
    return _with_means(first, second, diagonal)


def _with_means(first: Tensor, second: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """From Σ_q E[φ_pq φ_rq] to E[y_p y_r], given E[φ_pq] (H,Q,P): the inputs are independent."""
    total = first.sum(1)
    if diagonal:
        return total, second - first.square().sum(1) + total.square()
    within = torch.einsum("hqp,hqr->hpr", first, first)
    return total, second - within + total.unsqueeze(-1) * total.unsqueeze(-2)


def moments_after(step: Callable[[Tensor], Tensor], mean: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """E[s] (H,R) and E[s sᵀ] (H,R,R) of s = step(y), y normal with this mean and E[y yᵀ]; sampled."""
    covariance = power - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    noise = torch.randn(len(mean), SAMPLES, mean.shape[-1], dtype=mean.dtype, device=mean.device)
    s = step(mean.unsqueeze(1) + noise @ root.transpose(-2, -1))
    return s.mean(1), s.transpose(-2, -1) @ s / SAMPLES


def moments_with_places(mean: Tensor, power: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """E[y] (H,R) and E[y yᵀ] (H,R,R) of y = x + C_k over all queries k, C (H,N,R), given those of x."""
    C = C.double()
    average = C.mean(1)
    crossed = mean.unsqueeze(-1) * average.unsqueeze(-2)
    return mean + average, power + crossed + crossed.transpose(-2, -1) + C.transpose(-2, -1) @ C / C.shape[1]


def edges_power(layer: EdgeLayer, num_tokens: int) -> tuple[Tensor, Tensor]:
    """E of one σ_kn, averaged over n, and E Σ_n σ_kn², (H,) each, where edges alone give σ: each output the sum of
    all that one row of scores gives."""
    mean, power = edge_moments(layer, diagonal=True)
    return mean.mean(-1), power.sum(-1) * (num_tokens / layer.outputs)


def rows_power(sigma: Tensor) -> Tensor:
    """Σ_n σ_kn² (H,), the mean over rows."""
    return sigma.square().sum(-1).mean(-1)


def projected_power(W: Tensor, power: Tensor) -> Tensor:
    """E Σ_n (W h)_n² (H,), W (H,N,R), given E[h hᵀ] (H,R,R)."""
    W = W.double()
    return torch.einsum("hnp,hpr,hnr->h", W, power, W)


def scale_edges(layer: EdgeLayer, factor: Tensor) -> None:
    """Multiply the amplitudes of all edges; factor (H,1,P) or (H,1,1)."""
    factor = factor.nan_to_num(posinf=1.0)
    for parameter in layer.amplitudes:
        parameter.mul_((factor.unsqueeze(1) if parameter.dim() == 4 else factor).to(parameter))


def scale_map(parameter: Tensor | None, factor: Tensor) -> None:
    """Multiply W or C (H,·,·) by a factor (H,)."""
    assert parameter is not None
    parameter.mul_(factor.to(parameter)[:, None, None])
