"""A call of attention: fused, or softmax over scores written out; and where its head axis is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat.models.attention import MASKED, AttentionInputs, split_mask
from karat.ops.masks import as_mask


@dataclass(frozen=True)
class Layout:
    """Where the H heads are among the leading axes of queries or scores (…,M,N).

    axis: the head axis; None: there is none, and H is one. folded: the heads are part of the first axis, the inner one,
    (B·H,…), as in `F.multi_head_attention_forward`, or where axis is 0 the outer one, (H·B,…). leading: how many
    leading axes there are.
    """

    heads: int
    axis: int | None = 1
    folded: bool = False
    leading: int = 2

    def fits(self, leading: int) -> Layout:
        """The layout for a call with so many leading axes: this one, or what is usual for (B,H) and (B·H)."""
        if leading == self.leading or leading > 2:
            return self
        if leading == 2:
            return Layout(self.heads)
        return Layout(self.heads, None if self.heads == 1 else 1, folded=self.heads > 1, leading=1)

    def fold(self, x: Tensor) -> Tensor:
        """(…,M,D) -> (B,H,M,D), all other leading axes in B."""
        if self.folded:
            x = x.unflatten(0, (-1, self.heads) if self.axis else (self.heads, -1))
        if self.axis is None:
            return x.flatten(0, -3).unsqueeze(1)
        return x if x.dim() == 4 and self.axis == 1 else x.movedim(self.axis, -3).flatten(0, -4)

    def unfold(self, x: Tensor, leading: torch.Size) -> Tensor:
        """The inverse of `fold`, for these leading axes: (B,H,M,D) -> (…,M,D)."""
        if self.axis is None:
            return x.squeeze(1).unflatten(0, leading)
        axes = list(leading)
        if self.folded:
            axes = [leading[0] // self.heads, *leading[1:]]
            axes.insert(self.axis, self.heads)
        if len(axes) != 2 or self.axis != 1:
            x = x.unflatten(0, axes[: self.axis] + axes[self.axis + 1 :]).movedim(-3, self.axis)
        return x.flatten(0, 1) if self.folded else x

    def fold_mask(self, mask: Tensor | None, leading: torch.Size) -> Tensor | None:
        """A mask or bias, broadcastable to (…,M,N), as (B,H,M,N) has it."""
        if mask is None or (len(leading) == 2 and self.axis == 1):
            return as_mask(mask)
        mask = mask[(None,) * (len(leading) + 2 - mask.dim())]
        return self.fold(mask.expand(*leading, *mask.shape[-2:]))


class Fused(NamedTuple):
    """The arguments of `F.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(…,M,N) of the scores."""
        return (*self.query.shape[:-1], self.key.shape[-2])

    def inputs(self, layout: Layout) -> AttentionInputs:
        """What goes to the operator."""
        leading, (M, N) = self.query.shape[:-2], self.shape[-2:]
        keys, values = (_like(x, self.query, self.enable_gqa) for x in (self.key, self.value))
        q, k, v = (layout.fold(x) for x in (self.query, keys, values))
        bias, mask = (layout.fold_mask(x, leading) for x in split_mask(self.attn_mask))
        if self.is_causal:
            past = torch.ones(M, N, dtype=torch.bool, device=q.device).tril()
            mask = as_mask(past) if mask is None else mask & past
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return AttentionInputs(q, k, v, scale, bias, mask)


def _fused(*args: Any, **kwargs: Any) -> Fused:
    """The call, its queries as many as its keys are."""
    call = Fused(*args, **kwargs)
    query, own = call.query, -3 if call.enable_gqa else -2  # heads in groups don't broadcast
    leading = torch.broadcast_shapes(*(x.shape[:own] for x in call[:3])) + query.shape[own:]
    return call if leading == query.shape else call._replace(query=query.expand(leading))


def _like(x: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """Keys or values with as many heads as the queries."""
    if x.shape[:-2] == query.shape[:-2]:
        return x
    if grouped:
        x = x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
    return x.expand(*query.shape[:-2], *x.shape[-2:])


class Written(NamedTuple):
    """Softmax over the last axis of scores (…,M,N)."""

    scores: Tensor
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(…,M,N) of the scores."""
        return tuple(self.scores.shape)


Call = Fused | Written


def _softmax(input: Tensor, dim: Any = None, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Written | None:
    """The call, where it is over the last axis of what may be scores."""
    if dim is None or input.dim() < 3 or dim not in (-1, input.dim() - 1):
        return None
    kinds = [x for x in rest if isinstance(x, torch.dtype)]
    return Written(input, kinds[0] if kinds else dtype)


CALLS: dict[Any, Callable[..., Call | None]] = {
    F.scaled_dot_product_attention: _fused,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    torch.special.softmax: _softmax,
    Tensor.softmax: _softmax,
}


def _smaller(a: Any, b: Any, *_: Any) -> Any:
    return a if isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel() < b.numel() else b


SUMS: dict[Any, Callable[..., Any]] = {  # a sum -> which of its terms a mask would be
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, operator.add, operator.iadd), _smaller),
    torch.baddbmm: lambda added, *_: added,
}


def masked_sum(func: Any, args: Any, kwargs: Any, keys: Collection[int]) -> Any:
    """A sum; minus infinity where scores over so many keys got a mask, entries ≤ −100, which scores may have raised."""
    total = func(*args, **kwargs)
    added = SUMS[func](*args) if not kwargs and len(args) > 1 else None
    if not isinstance(added, Tensor) or not added.is_floating_point() or min(total.dim() - 1, added.dim()) < 2:
        return total
    M, N = total.shape[-2:]
    if N not in keys or added.shape[-1] != N or added.shape[-2] not in (1, M):
        return total
    fill = total.masked_fill_ if total is args[0] else total.masked_fill
    return fill(added <= MASKED, -torch.inf)


# PyTorch's own function past the question whether a mode is active, which would call the mode for ever.
_entered = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward`, whose calls an active mode sees."""
    return _entered(*args, **kwargs)


def module_forward(module: Any) -> Callable[..., Any]:
    """What the class of a module computes; of `nn.MultiheadAttention` without its fast path, which has no softmax."""
    if type(module).forward is nn.MultiheadAttention.forward:
        return _multihead
    forward: Callable[..., Any] = type(module).forward
    return forward


_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _multihead(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """`nn.MultiheadAttention.forward`."""
    options |= dict(zip(_OPTIONS, rest, strict=False))
    swapped = module.batch_first and query.dim() == 3
    if swapped:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if not module._qkv_same_embed_dim:
        own = {f"{name}_proj_weight": getattr(module, f"{name}_proj_weight") for name in "qkv"}
        options |= own | {"use_separate_proj_weight": True}
    out, weights = multi_head_attention(
        *(query, key, value, module.embed_dim, module.num_heads, module.in_proj_weight, module.in_proj_bias),
        *(module.bias_k, module.bias_v, module.add_zero_attn, module.dropout),
        *(module.out_proj.weight, module.out_proj.bias),
        training=module.training,
        **options,
    )
    return (out.transpose(0, 1) if swapped else out), weights


HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead")


def heads_of(modules: list[nn.Module]) -> int | None:
    """The number of heads that the innermost of some modules names."""
    for module in modules:
        for name in HEADS:
            found = getattr(module, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def layout_of(call: Call, heads: int | None, batch: int) -> Layout | str:
    """Where the heads of a call are, from the module's number of heads and the example's images; or why it can't be
    told."""
    leading = list(call.shape[:-2])
    count = len(leading)
    where = f"queries or scores of shape {tuple(call.shape)}"
    if not count:
        return f"{where} are of one input and one head; call for attention of all at once"
    if count == 2 and (leading[1] == heads or heads is None):
        return Layout(leading[1])
    if count == 1:
        if heads == 1 or leading[0] == batch:
            return Layout(1, None, leading=count)
        if heads is not None and leading[0] % (batch * heads) == 0:
            return Layout(heads, folded=True, leading=count)
        return f"{where} don't tell which axis is the heads'; give the module an attribute num_heads"
    found = [i for i, size in enumerate(leading) if size == heads and (i or heads != batch)]
    if heads == 1:
        return Layout(1, found[-1], leading=count) if found else Layout(1, None, leading=count)
    if len(found) > 1:
        found = [i for i in found if _beside(call, i)] or found
    if len(found) == 1:
        return Layout(int(leading[found[0]]), found[0], leading=count)
    if heads is not None and not found and leading[0] % (batch * heads) == 0 and isinstance(call, Written):
        return Layout(heads, folded=True, leading=count)
    if count == 2 and isinstance(call, Fused):
        return Layout(leading[1])  # as PyTorch documents it
    told = f"num_heads={heads} fits {len(found)} of them" if heads else "the module has no num_heads"
    return f"{where} don't tell which axis is the heads': {told}; try an example of another size"


def settled(layout: Layout, call: Call, batch: int) -> Layout | str:
    """A layout whose first axis is images, or images and heads, by a call for images that are alike, in which each
    head has the same for all of them; or why it is neither."""
    x = call.query if isinstance(call, Fused) else call.scores
    if layout.leading != 1 or x.is_meta or x.shape[0] % batch:
        return layout
    images = x.unflatten(0, (batch, -1))
    windows = x.unflatten(0, (-1, batch, layout.heads)).transpose(0, 1) if layout.folded else images
    if _alike(images) or _alike(windows):
        return layout
    if layout.folded and _alike(x.unflatten(0, (layout.heads, batch, -1)).transpose(0, 1)):
        return replace(layout, axis=0)
    return f"the first axis of queries or scores of shape {tuple(call.shape)} isn't the example's inputs, nor its heads"


def _alike(x: Tensor) -> bool:
    """Whether the entries of the first axis are the same, up to rounding."""
    x = x.float()
    return torch.allclose(x, x[:1].expand_as(x), rtol=1e-2, atol=1e-3 * float(x.abs().median()))


def _beside(call: Call, axis: int) -> bool:
    """Whether an axis lies beside the last one in memory, as the head axis of a projection does."""
    x = call.value if isinstance(call, Fused) else call.scores
    return isinstance(call, Fused) and x.stride(axis) == x.stride(-1) * x.shape[-1] and math.prod(x.shape) > 0
