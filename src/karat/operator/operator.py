"""The learnable operator that takes softmax's place: σ(A), or σ(A) v without forming σ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.basis import Basis
from karat.errors import not_scripted
from karat.operator.config import KArAtConfig
from karat.operator.edges import EdgeLayer
from karat.operator.fixed import FIXED
from karat.operator.initialise import initialise
from karat.operator.orders import ORDERS
from karat.operator.parameters import OperatorParameters
from karat.operator.simplex import simplex_projection
from karat.ops import Call, Projector, attend, basis_sums, joint_sums
from karat.ops.checks import call_of, check_values, of_pairs
from karat.ops.masks import as_mask, row_patterns, safe_softmax, softmax_attention
from karat.ops.reference import autocasting


class KArAtOperator(OperatorParameters):
    """σ: a learnable map of each row of attention scores to a row of attention, each head its own (paper §3; SPEC §1).

    Low rank, order W∘Φ:  Φ̂(A)_k,p = Σ_q φ_pq(A_k,q),  σ(A)_k,n = Σ_p W_n,p Φ̂(A)_k,p;  see `karat.operator.orders` for
    the others, `KArAtConfig` for the settings. Heads in `softmax_heads` keep softmax and have no parameters here.

    `op(scores)` gives σ to look at, `op.attend(q, k, v)` the output to run with; they agree.

    Args:
        num_heads: H, all heads.
        num_tokens: N, the number of keys. The number of queries is free where they have no places of their own.
        config: the settings, or their short name.

    Parameters: `layers[i]` (an EdgeLayer each), `W` (H',N,R), (H',R,N), (H',N,1) of a row, or None, `C` (H',N,R) with a
    term of the query's position (static mixing: C (H',N,R), at full rank (H',N,N)) or None, `gate` (H',), with
    residual="softmax" and no fixed gate; H' counts the heads that learn.

    >>> op = KArAtOperator(num_heads=3, num_tokens=17, config="g3b")
    >>> q, k, v = torch.randn(3, 2, 3, 17, 8).unbind()
    >>> torch.allclose(op.attend(q, k, v), op(q @ k.transpose(-2, -1) * 8**-0.5) @ v, atol=1e-5)
    True
    """

    config: KArAtConfig
    __prepare_scriptable__ = not_scripted

    def __init__(self, num_heads: int, num_tokens: int, config: KArAtConfig | str) -> None:
        for name, value in (("num_heads", num_heads), ("num_tokens", num_tokens)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be >= 1, a whole number, got {value!r}")
        config = KArAtConfig.parse(config)
        softmax_heads = config.softmax_head_indices(num_heads)
        if config.is_fixed and not config.has_operator:
            raise ValueError(
                f"attention={config} has two maps of half the width, no operator: it serves timm's ViT and DeiT alone"
            )
        order = FIXED[config.basis] if config.is_fixed else ORDERS[config.order_key]
        blind = config.is_fixed or config.is_static
        edges = None if blind else (config.edge_basis, config.edge_scales)  # softmax has none, which is an error
        gated = config.residual is not None and config.gate == "head"
        super().__init__(num_heads - len(softmax_heads), num_tokens, order.layout_for(config), config, edges, gated)
        self.num_heads, self.order = num_heads, order
        self.softmax_heads = softmax_heads
        self.karat_heads = tuple(head for head in range(num_heads) if head not in softmax_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, by the configuration's `init`."""
        initialise(self, self.order, self.config)

    def edges(self, x: Tensor, layer: int = 0) -> Tensor:
        """φ_pq(x), the value of every edge function: x (...,) -> (...,H',P,Q), in x's precision.

        By the definition and independent of the fast path: the way to read, plot and check what was learned.
        `layer` is 0, or 1 for Φ₂ in order PhiPhi.
        """
        if not self.layers:
            what = "static mixing is blind to the scores" if self.config.is_static else f"{self.config} is fixed"
            raise ValueError(f"{what}: it has no edge functions")
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer must be 0 to {len(self.layers) - 1} in order {self.config.order}, got {layer}")
        return self.edge_layers[layer].edges(x)

    def arguments(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the first edge functions act on, in the heads that learn: (B,H,M,N), mask as in `forward` -> (B,H',M,Q).

        The scores themselves, but for order PhiW.
        """
        some = _places(self.karat_heads)
        return self.order.arguments(self, scores[:, some], _heads(as_mask(mask), some))

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """σ(scores): (B,H,M,N) -> (B,H,M,N), in the scores' precision.

        `mask` is boolean, broadcastable to (B,H,M,N), True = may attend: a pair that may not adds exactly zero to
        the operator's sums and has exactly zero weight in σ.

        Raises ValueError for scores of other axes or of whole numbers, a number of heads or keys, or of queries where
        they have places of their own, that isn't the operator's, and for a mask that doesn't fit.
        """
        if scores.dim() != 4:
            raise ValueError(f"scores must be (B,H,M,N), got {tuple(scores.shape)}")
        _check_real("scores", scores)
        self._check(*scores.shape[1:])
        mask = of_pairs("mask", mask, tuple(scores.shape), scores)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        values = scores.to(dtype)
        if not self.softmax_heads:
            return self._sigma_of_scores(values, mask).to(scores.dtype)
        some, others = _places(self.karat_heads), _places(self.softmax_heads)
        learned = self._sigma_of_scores(values[:, some], _heads(mask, some))
        fixed = safe_softmax(values[:, others], _heads(mask, others))
        return self._in_order(learned, fixed).to(scores.dtype)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """σ(scale · q kᵀ + bias) v: (B,H,M,D), (B,H,N,D), (B,H,N,D) -> (B,H,M,D).

        Nothing of size M·N is kept wherever SPEC §8 allows it. σ is formed, and kept for the backward pass, with
        `dropout_p` > 0, with simplex="row", for bases that aren't linear in their parameters in every order but W∘Φ,
        in order Pointwise below 1024 keys, and with a mask of pairs: at full rank and in order Pointwise always,
        elsewhere unless its rows are of at most four kinds and N > 128 (always under torch.compile). So are the scores
        in order PhiW with a mask of pairs.

        Args:
            scale: factor of q·k; None means 1/√D.
            bias: added to the scores, broadcastable to (B,H,M,N).
            mask: boolean, broadcastable to (B,H,M,N), True = may attend; see `forward`.
            dropout_p: probability of dropping an entry of σ.

        Raises:
            ValueError: q, k and v that don't fit each other, a bias or mask that doesn't fit them, a number of heads or
                keys, or of queries where they have places of their own, that isn't the operator's.
        """
        if not autocasting(q):  # which brings dtypes together
            check_values(q, k, v)
        _check_real("q", q)
        self._check(q.shape[1], q.shape[2], k.shape[2])
        full = (*q.shape[:3], k.shape[2])
        call = call_of(q, k, scale, of_pairs("bias", bias, full, q), of_pairs("mask", mask, full, q))
        if not self.softmax_heads:
            return self._attend(call, v, dropout_p)
        some, others = _places(self.karat_heads), _places(self.softmax_heads)
        learned = self._attend(_heads_of(call, some), v[:, some], dropout_p)
        q, k, scale, bias, mask = _heads_of(call, others)
        fixed = softmax_attention(q, k, v[:, others], scale, bias, mask, dropout_p)
        # (B,M,·,D): as the model joins its heads
        return self._in_order(learned.transpose(1, 2), fixed.transpose(1, 2), dim=2).transpose(1, 2)

    def _attend(self, call: Call, v: Tensor, dropout_p: float) -> Tensor:
        """σ v of the heads that learn, softmax beside it included."""
        order, config, mask = self.order, self.config, call.mask
        if dropout_p != 0:  # F.dropout refuses what is no probability
            sigma = self._sigma(self._sums(call, order.to_sum(self)), mask)
            if config.residual:
                sigma = safe_softmax(call.scores(), mask) + self._gated(sigma)
            return F.dropout(sigma, dropout_p) @ v
        if order.projects(self) and (mask is None or mask.shape[2] == 1):
            return self._in_one(call, v)
        # a projection needs σ, a mask of pairs needs it or at least sums that v has no part in
        row_by_row = config.simplex == "row" or (mask is not None and mask.shape[2] > 1)
        kept = v if row_by_row or mask is None else torch.where(mask.transpose(-2, -1), v, 0)
        summed = order.to_sum(self, None if row_by_row else kept)
        attended: Tensor | None = None
        if summed is not None and config.residual and config.simplex != "row":
            attended, sums = joint_sums(call, v, *summed, config.impl)  # one pass for both parts (SPEC §10)
        else:
            sums = self._sums(call, summed)
        out = self._row_by_row(sums, v, mask) if row_by_row else order.finish(self, sums, kept)
        if not config.residual:
            return out
        if attended is None:
            attended = softmax_attention(call.q, call.k, v, call.scale, call.bias, mask)
        return attended + self._gated(out)

    def _in_one(self, call: Call, v: Tensor) -> Tensor:
        """`_attend` where it's one operation: the sums, the projector and softmax beside them."""
        config, layer = self.config, self.edge_layers[0] if self.layers else None
        fixed = config.residual is not None and self.gate is None
        factors = None if layer is None or fixed else (layer.factor, self.W_factor)
        w = self.projector if factors is None else self.W
        assert w is not None
        w = w * float(config.gate) if fixed else w
        projector = Projector(v, w, self.gate, config.residual is not None, factors, self.places)
        if layer is None:
            return attend(call, None, None, projector, config.impl)
        return attend(call, layer.packed() if factors is None else layer.stacked(), layer.basis, projector, config.impl)

    def _sums(self, call: Call, summed: tuple[Tensor, Basis] | None) -> Tensor:
        """What `order.finish` takes: the sums, or what the order forms in their place."""
        return self.order.form(self, call) if summed is None else basis_sums(call, *summed, self.config.impl)

    def _row_by_row(self, sums: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """σ v where each row has a mask of its own, or is projected."""
        if self.config.simplex != "row" and not self.order.gives_sigma and mask is not None:
            patterns = row_patterns(mask)
            if patterns is not None:  # what v becomes under each kind of mask, kind by kind
                rows = [
                    torch.where(member, self.order.finish(self, sums, torch.where(keys, v, 0)), 0)
                    for member, keys in patterns
                ]
                return torch.stack(rows).sum(0)
        return self._sigma(sums, mask) @ v

    def _sigma_of_scores(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        sigma = self._sigma(self.order.of_scores(self, scores, mask), mask)
        return safe_softmax(scores, mask) + self._gated(sigma) if self.config.residual else sigma

    def _sigma(self, sums: Tensor, mask: Tensor | None) -> Tensor:
        """The operator's σ (B,H,M,N), projected where asked for, exactly zero for masked pairs."""
        sigma = self.order.finish(self, sums, None)
        if self.config.simplex == "row":
            return simplex_projection(sigma, mask)
        return sigma if mask is None else torch.where(mask, sigma, 0)

    def _gated(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return float(self.config.gate) * x
        return self.gate.to(x.dtype)[:, None, None] * x

    def _in_order(self, learned: Tensor, fixed: Tensor, dim: int = 1) -> Tensor:
        """Heads that learn and heads that don't, each along axis `dim`, back in the order of the model's heads."""
        parts = [(self.karat_heads, learned), (self.softmax_heads, fixed.to(learned.dtype))]
        parts.sort(key=lambda part: part[0])
        places = [head for heads, _ in parts for head in heads]
        joined = torch.cat([part for _, part in parts], dim)
        if places == sorted(places):
            return joined
        return joined[(slice(None),) * dim + ([places.index(head) for head in range(self.num_heads)],)]

    def _check(self, heads: int, queries: int, keys: int) -> None:
        if heads != self.num_heads:
            raise ValueError(
                f"the operator has {self.num_heads} heads, the input {heads}; build it with num_heads={heads}"
            )
        if keys != self.num_tokens:
            raise ValueError(
                f"the operator was made for {self.num_tokens} tokens and got {keys}; carry the model to the new "
                "token grid with karat.resample_tokens(model, img_size=...), or build the operator with "
                f"num_tokens={keys}"
            )
        if self.order.own_key and queries != keys:
            raise ValueError(
                f"{self.config} hides each query's own key, and there are {queries} queries for {keys} keys: it serves "
                "self-attention over all tokens alone"
            )
        if self.C is not None and queries != keys:
            setting = "static mixing" if self.config.is_static else f"position={self.config.position!r}"
            raise ValueError(
                f"{setting} learns the place of each query among {keys} tokens and got {queries} queries: it serves "
                "self-attention over all tokens alone"
            )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_tokens={self.num_tokens}, config={self.config}"


def _check_real(name: str, x: Tensor) -> None:
    """Raises ValueError for numbers that can't hold what the operator gives in their precision."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; write {name}.float()")


def karat_operators(model: nn.Module) -> dict[str, KArAtOperator]:
    """The operators of a converted model by name, each once; one for all blocks if they share it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KArAtOperator)}


def factors_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The name of every factor in a model's state, with those of the parameters that it multiplies."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, EdgeLayer | KArAtOperator):
            prefix = f"{name}." if name else ""
            for buffer, parameters in module.factored().items():
                found[prefix + buffer] = tuple(prefix + parameter for parameter in parameters)
    return found


def with_factors(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights by name, completed by factors of one where they were saved before there were any."""
    found = dict(weights)
    for factor, parameters in factors_of(model).items():
        if any(name in weights for name in parameters):
            like = next(weights[name] for name in parameters if name in weights)  # a model is of one precision
            found.setdefault(factor, torch.ones_like(model.get_buffer(factor), device="cpu", dtype=like.dtype))
    return found


def without_torn_layers(model: nn.Module, taken: Mapping[str, Tensor], given: Collection[str]) -> dict[str, Tensor]:
    """Some weights for a model without the layers of operators that they would change the meaning of.

    A factor and what it multiplies go together: a layer of which the given names have a part only, or more than the
    model's has (other edge scales, another base activation), is left as it is.
    """
    own, factors = model.state_dict(), factors_of(model)
    torn: set[str] = set()
    for factor, parameters in factors.items():
        mine = {factor, *parameters}
        if factor.endswith(".factor"):
            layer = factor.removesuffix("factor")
            mine = {name for name in own if name.startswith(layer)}
            mine |= {name for name in given if name.startswith(layer)}
        if not mine <= set(taken):
            torn |= mine
    return {name: tensor for name, tensor in taken.items() if name not in torn}


def _places(heads: tuple[int, ...]) -> slice | tuple[int, ...]:
    """An index of these heads: a slice, which copies nothing, if they are neighbours."""
    return slice(heads[0], heads[-1] + 1) if heads and heads[-1] - heads[0] == len(heads) - 1 else heads


def _heads(x: Tensor | None, heads: slice | tuple[int, ...]) -> Tensor | None:
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def _heads_of(call: Call, heads: slice | tuple[int, ...]) -> Call:
    return Call(call.q[:, heads], call.k[:, heads], call.scale, _heads(call.bias, heads), _heads(call.mask, heads))
