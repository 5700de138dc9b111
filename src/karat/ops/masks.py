"""Softmax and masks: their four axes, rows without any key, and masks whose rows are of few kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from karat.ops.transforms import looked_through

# Below this many keys forming σ is cheaper than one product with v for each kind of row.
FEWEST_KEYS = 128
MOST_PATTERNS = 4
# From this many keys on, a mask of keys costs softmax no memory of size M·N; below, that memory is small.
LINEAR_FROM = 1024
LOWERED = 3e4  # within float16, and times 1/√D still far below any score
P_BYTES, DROPPED_BYTES, COPIES_BYTES = 2, 5, 16  # of a key, of one under dropout, of a coordinate: see `_fused`
SURELY_ZERO = 300.0  # so far below the others exp() is zero, in float32 from 104 on, with room for the scores' spread


def as_mask(x: Tensor | None) -> Tensor | None:
    """A mask or bias that broadcasts to (B,H,M,N), with leading axes of one up to four of them; None stays None.

    >>> as_mask(torch.ones(5, 7, dtype=torch.bool)).shape
    torch.Size([1, 1, 5, 7])
    """
    return x if x is None or x.dim() >= 4 else x[(None,) * (4 - x.dim())]


def safe_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax over the keys that the mask allows, (B,H,M,N); exactly zero elsewhere and in rows that allow none."""
    if mask is None:
        return scores.softmax(-1)
    mask = mask.expand(*mask.shape[:3], scores.shape[-1])
    return torch.where(mask, _lowered(scores, mask).softmax(-1), 0)


def _lowered(x: Tensor, mask: Tensor) -> Tensor:
    """x, -inf where a pair takes no part; rows without any key are zero, so that none is all -inf: NaN never arises."""
    return torch.where(mask, x, torch.where(mask.any(-1, keepdim=True), -torch.inf, 0.0).to(x.dtype))


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v through PyTorch's fused attention; rows that may see no key give zero."""
    if mask is None:
        return _fused(q, k, v, _fitting(bias, q, k), dropout_p, scale)
    if bias is None and mask.shape[2] == 1 and k.shape[2] >= LINEAR_FROM and scale * LOWERED > SURELY_ZERO:
        return _masked_keys(q, k, v, scale, mask, dropout_p)
    mask = mask.expand(*mask.shape[:3], k.shape[2])
    reachable = mask.any(-1, keepdim=True)
    attn_mask = mask | ~reachable if bias is None else _lowered(bias.to(q.dtype), mask)
    out = _fused(q, k, v, _fitting(attn_mask, q, k), dropout_p, scale)
    return torch.where(reachable, out, 0)


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float) -> Tensor:
    """PyTorch's fused attention, which keeps nothing of size M·N only where v is as wide as q and k.

    On a CPU it is slower in half precision than in float32, many times so with few keys. There it is given float32
    copies of q, k, v, which it keeps: 16·D bytes a token with its output. Products in bfloat16 are twice as fast again
    and keep P, 2·N bytes a query (5·N with dropout, whose mask and product stay too); they are taken where that is
    less. They round the scores to bfloat16: an error of about 0.4 % of the output for standard normal scores, 1 % for
    scores that spread eight times as far.
    """
    if looked_through(q, k, v, attn_mask):  # which PyTorch's fused attention can't serve
        return _plain(q, k, v, attn_mask, dropout_p, scale)
    if q.device.type == "cpu" and q.element_size() == 2 and not torch.compiler.is_exporting():
        with torch.autocast("cpu", enabled=False):
            products = k.shape[2] * (DROPPED_BYTES if dropout_p else P_BYTES)
            alike = q.dtype == k.dtype == v.dtype == torch.bfloat16
            if alike and products <= q.shape[-1] * COPIES_BYTES:
                return _plain(q, k, v, attn_mask, dropout_p, scale)
            wide = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
            return _fused(q.float(), k.float(), v.float(), attn_mask if wide is None else wide, dropout_p, scale).to(
                q.dtype
            )
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    if torch.compiler.is_exporting():  # a translator may lay the result out in another order than was traced
        out = out.clone(memory_format=torch.contiguous_format)
    return out[..., :width]


def _plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v in three operations, which keep P."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def _masked_keys(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, dropout_p: float) -> Tensor:
    """Softmax under a mask of keys (B,H,1,N), without the M·N numbers that a mask given to PyTorch becomes.

    One more coordinate, 1 in the queries and -30000 in the masked keys, whose others become zero, lowers their scores
    so far that their weight is exactly zero. Seven more of zeros keep the width a multiple of eight, which the fused
    kernels like.
    """
    mask_of_k = mask.transpose(-2, -1)  # (B,H,N,1)
    lowered = torch.where(mask_of_k, 0.0, -LOWERED).to(k.dtype).expand(*k.shape[:3], 1)
    columns, ones = F.pad(lowered, (0, 7)), F.pad(q.new_ones(*q.shape[:3], 1), (0, 7))
    keys = torch.cat([torch.where(mask_of_k, k, 0), columns], -1)
    out = _fused(torch.cat([q, ones], -1), keys, v, None, dropout_p, scale)
    return torch.where(mask.any(-1, keepdim=True), out, 0)


def _fitting(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """An additive mask in q's precision, its last axes whole."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)


def row_patterns(mask: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """The few kinds of rows that a mask of pairs (B,H,M,N) has, as in shifted windows, where they're at most four.

    Returns [(which rows (B,H,M,1), which keys they see (B,H,N,1)), ...]; None if there are more than four kinds,
    if N is so small that forming σ is cheaper, or while compiling and in torch.func (it depends on the data).
    """
    if mask.shape[-1] <= FEWEST_KEYS or torch.compiler.is_compiling() or looked_through():
        return None
    pending = torch.ones(mask.shape[:3], dtype=torch.bool, device=mask.device)
    patterns = []
    for _ in range(MOST_PATTERNS):
        first = pending.int().argmax(-1)[..., None, None].expand(*mask.shape[:2], 1, mask.shape[-1])
        keys = mask.gather(2, first)  # (B,H,1,N): the first row not yet taken
        member = pending & (mask == keys).all(-1)
        patterns.append((member.unsqueeze(-1), keys.transpose(-2, -1)))
        pending = pending & ~member
        if not pending.any():
            return patterns
    return None
