"""How an operator starts.

"paper": the draws of SPEC §2, W as a linear layer's. "default": random draws scaled so that, for scores of unit
variance, O = σ(A) V starts as large as under softmax of equal scores, E Σ_n σ_kn² = 1/N, and beside softmax with the
variance of V's entries, E Σ_n σ_kn² = 1: exactly in expectation over the scores for the numbers drawn, as the moments
of every edge function are integrated, not estimated. A start at V's variance in place of softmax drowns each token in
the others' noise, and fails at rates that softmax bears (docs/training-stability.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from karat.basis import LinearBasis
from karat.operator.edges import EdgeLayer
from karat.operator.rates import set_factors
from karat.operator.simplex import simplex_projection

if TYPE_CHECKING:
    from karat.operator.operator import KArAtOperator

Inputs = Callable[[Tensor], Tensor]

NODES, REACH = (
    129,
    6.0,
)  # trapezoidal rule on [-6, 6]: spectrally accurate for smooth functions times a Gaussian
CHUNK_NUMBERS = 1 << 22
SAMPLES = 4096
FEW_TOKENS = 64  # up to here what the last layer sees is neither normal nor independent enough: it's sampled


@torch.no_grad()
def initialise(op: KArAtOperator) -> None:
    """Draw all of the operator's parameters by its configuration. Does nothing on the meta device."""
    if next(op.parameters()).is_meta:
        return
    if op.gate is not None:
        nn.init.zeros_(op.gate)
    _forget_factors(op)
    for layer in op.edge_layers:
        _draw(layer, op.config.init)
    if op.C is not None:
        nn.init.normal_(op.C) if _mixes_places(op) else nn.init.zeros_(op.C)
    if op.config.init == "paper":
        if op.W is not None:
            bound = op.W.shape[-1] ** -0.5
            nn.init.uniform_(op.W, -bound, bound)
    else:
        if op.W is not None:
            for head in op.W:
                _semi_orthogonal(head)
        if op.order.layer_shapes[:1] == ("NR",):  # Φ̂ first: each of its R numbers starts with unit power
            layer = op.edge_layers[0]
            _scale(layer, _moments(layer)[1].diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(1))
        if _adds_to_edges(op):
            _scale_edges(op, _edges_power(op)[1].rsqrt())
            _match_places(op)
        _scale_last(op, _output_power(op).rsqrt())
        if _adds_to_edges(op):  # anew: a base activation without a scale stays what it is
            _match_places(op)
    size, share = _size(op), op.config.init_scale
    if size * share != 1.0:
        _scale_last(op, torch.full((len(op.karat_heads),), size * share))
    if op.config.init == "default":
        set_factors(op, size * (share or 1.0))


def _forget_factors(op: KArAtOperator) -> None:
    for layer in op.edge_layers:
        layer.factor.fill_(1.0)
    for name in op.factored():
        op.get_buffer(name).fill_(1.0)


def _size(op: KArAtOperator) -> float:
    """The size of O at the start as a share of V's.

    In place of softmax it's that of softmax over equal scores, 1/√N; beside it one: a gate says how much is taken.
    """
    # b(x) in what multiplies the values keeps its size
    fixed = any(
        layer.has_fixed_base and shape[1] != "R"
        for layer, shape in zip(op.edge_layers, op.order.layer_shapes, strict=True)
    )
    in_its_place = op.config.init == "default" and op.config.residual is None and not fixed
    return float(op.num_tokens**-0.5) if in_its_place else 1.0


def _mixes_places(op: KArAtOperator) -> bool:
    """Whether C takes part from the start: alone, as a factor of W alone, or added to sums that have unit power as its
    own numbers have.

    C is drawn so that the sum holds static mixing at once: at zero beside a gate of zero
    it left the curve of a training what it is without C.
    """
    return not op.edge_layers or _adds_to_edges(op) or (op.config.position == "query" and op.config.init == "default")


def _output_power(op: KArAtOperator) -> Tensor:
    """E Σ_n σ_kn² (H,) for the numbers drawn, scores of unit variance."""
    if op.order.projector_shape == "N1":  # W is all there is
        assert op.W is not None
        return op.W.double().square().sum((-2, -1))
    if _adds_to_edges(op):
        (mean, power), places = _edges_power(op), _places(op)
        return power + 2 * mean * places.sum(-1).mean(-1) + _rows_power(places)
    if op.order.projector_shape == "NR":  # W last
        assert op.W is not None
        W = op.W.double()
        return torch.einsum("hnp,hpr,hnr->h", W, _hidden_power(op), W)
    if not op.edge_layers:
        assert op.C is not None
        return _rows_power(op.C.double())
    last = op.edge_layers[-1]
    if op.order.gives_sigma:
        return _edges_power(op)[1]
    if op.num_tokens <= FEW_TOKENS or last.inputs > op.num_tokens:
        return _sampled_power(op)
    if len(op.edge_layers) == 2:  # Φ₂ sees what Φ̂ is: a sum over many keys, near normal, with a mean of its own
        mean, power = _moments(op.edge_layers[0])
        spread = (power.diagonal(dim1=-2, dim2=-1) - mean.square()).clamp(min=0).sqrt()
        return _moments(last, lambda z: mean + spread * z, diagonal=True)[1].sum(-1)
    return _moments(last, diagonal=True)[1].sum(-1)


def _adds_to_edges(op: KArAtOperator) -> bool:
    """Whether W has no part in what the edges give: order Pointwise with places."""
    return op.order.gives_sigma and bool(op.edge_layers) and op.W is not None


def _edges_power(op: KArAtOperator) -> tuple[Tensor, Tensor]:
    """E of one σ_kn, averaged over n, and E Σ_n σ_kn², (H,) each, where edges alone give σ: each output the sum of
    all that one row of scores gives."""
    last = op.edge_layers[-1]
    mean, power = _moments(last, diagonal=True)
    return mean.mean(-1), power.sum(-1) * (op.num_tokens / last.outputs)


def _places(op: KArAtOperator) -> Tensor:
    """C Wᵀ (H,N,N)."""
    assert op.places is not None
    assert op.projector is not None
    return op.places.double() @ op.projector.double().transpose(-2, -1)


def _rows_power(sigma: Tensor) -> Tensor:
    """Σ_n σ_kn² (H,), the mean over rows."""
    return sigma.square().sum(-1).mean(-1)


def _match_places(op: KArAtOperator) -> None:
    """Give C Wᵀ the power that the edges have."""
    _scale_projector(op, (_edges_power(op)[1] / _rows_power(_places(op))).sqrt())


def _hidden_power(op: KArAtOperator) -> Tensor:
    """E[h hᵀ] (H,R,R) of what W is given."""
    if not op.edge_layers:
        assert op.C is not None
        C = op.C.double()
        return C.transpose(-2, -1) @ C / op.num_tokens
    mean, power = _moments(op.edge_layers[0])
    if op.config.position == "query":
        mean, power = _moments_with_places(mean, power, op)
    if op.config.simplex == "rank":
        mean, power = _moments_after(simplex_projection, mean, power)
    return power


def _scale_last(op: KArAtOperator, factor: Tensor) -> None:
    """Multiply σ by factor (H,) through its last map: W, the last layer's amplitudes, both where they add up, or C."""
    if _adds_to_edges(op):
        _scale_edges(op, factor)
    if op.order.projector_shape in ("NR", "N1"):
        _scale_projector(op, factor)
    elif op.edge_layers:
        _scale_edges(op, factor)
    else:
        assert op.C is not None
        op.C.mul_(factor.to(op.C)[:, None, None])


def _scale_edges(op: KArAtOperator, factor: Tensor) -> None:
    _scale(op.edge_layers[-1], factor[:, None, None])


def _scale_projector(op: KArAtOperator, factor: Tensor) -> None:
    assert op.W is not None
    op.W.mul_(factor.to(op.W)[:, None, None])


def _draw(layer: EdgeLayer, init: str) -> None:
    for group in layer.basis.parameters:
        if group.name == "base":
            continue
        parameter = getattr(layer, group.name)
        nn.init.normal_(parameter, group.mean, group.std)
        if init == "default" and group.default_std is not None:
            parameter.mul_(parameter.new_tensor(group.default_std)[:, None, None])
    if layer.basis_scale is not None:
        nn.init.ones_(layer.basis_scale)
    if layer.base_scale is not None:
        nn.init.ones_(layer.base_scale)
        if init == "default" and layer.has_base:  # one more random coefficient
            nn.init.normal_(layer.base_scale)


def _semi_orthogonal(matrix: Tensor) -> None:
    """Unit rows and, where there are no more of them than columns, orthogonal; else orthogonal columns."""
    nn.init.orthogonal_(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        return
    matrix.div_(matrix.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _scale(layer: EdgeLayer, factor: Tensor) -> None:
    """Multiply the amplitudes of all edges; factor (H,1,P) or (H,1,1)."""
    factor = factor.nan_to_num(posinf=1.0)
    for parameter in layer.amplitudes:
        parameter.mul_((factor.unsqueeze(1) if parameter.dim() == 4 else factor).to(parameter))


def _moments(layer: EdgeLayer, inputs: Inputs | None = None, *, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """E[y_p] (H,P) and E[y_p y_r] (H,P,P), or its diagonal (H,P), for y_p = Σ_q φ_pq(x_q).

    The x_q are independent, functions of standard normal z: (nodes,1,1) -> (nodes,1,1) or (nodes,H,Q); z itself if
    not given.
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


def _moments_after(step: Callable[[Tensor], Tensor], mean: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """E[s] (H,R) and E[s sᵀ] (H,R,R) of s = step(y), y normal with this mean and E[y yᵀ]; sampled."""
    covariance = power - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    noise = torch.randn(len(mean), SAMPLES, mean.shape[-1], dtype=mean.dtype, device=mean.device)
    s = step(mean.unsqueeze(1) + noise @ root.transpose(-2, -1))
    return s.mean(1), s.transpose(-2, -1) @ s / SAMPLES


def _moments_with_places(mean: Tensor, power: Tensor, op: KArAtOperator) -> tuple[Tensor, Tensor]:
    """E[y] (H,R) and E[y yᵀ] (H,R,R) of y = x + C_k over all queries k, given those of x."""
    assert op.places is not None
    C = op.places.double()
    average = C.mean(1)
    crossed = mean.unsqueeze(-1) * average.unsqueeze(-2)
    return mean + average, power + crossed + crossed.transpose(-2, -1) + C.transpose(-2, -1) @ C / op.num_tokens


def _sampled_power(op: KArAtOperator) -> Tensor:
    """E Σ_n σ_n² (H,) over standard normal scores."""
    weight = op.edge_layers[0].packed()
    scores = torch.randn(1, weight.shape[0], SAMPLES, op.num_tokens, dtype=weight.dtype, device=weight.device)
    sigma = op.order.sigma(op, op.order.hidden_of_scores(op, scores, None))
    return sigma.double().square().sum(-1).mean((0, 2))
