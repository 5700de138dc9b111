"""Attention modules in the place of a backbone's own: around a learnable operator, around softmax with a relative
position bias, and on an attention that is handed in.

They take over the very submodules of the attention they replace (qkv, projection, norms, dropouts, position tables),
so that names in the state dict stay the same. `karat.models.backbones` says which takes whose place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from karat.errors import not_scripted
from karat.models.relative_bias import RelativeBias
from karat.models.tracing import SHARED, one_node
from karat.operator.grids import GridWatch
from karat.operator.operator import KArAtOperator
from karat.ops.masks import as_mask, safe_softmax, softmax_attention

# An additive mask entry this low means "masked": timm's Swin writes -100, others -inf or the smallest number.
MASKED = -100.0


class AttentionInputs(NamedTuple):
    """What an attention of any kind comes down to: scores scale·q kᵀ + bias where the mask allows, applied to v."""

    q: Tensor  # (B,H,M,D)
    k: Tensor  # (B,H,N,D)
    v: Tensor  # (B,H,N,D)
    scale: float
    bias: Tensor | None  # four axes, broadcastable to (B,H,M,N)
    mask: Tensor | None  # boolean, four axes, broadcastable to (B,H,M,N), True = takes part

    @property
    def scores(self) -> Tensor:
        """scale·q kᵀ + bias, (B,H,M,N)."""
        scores = self.q @ self.k.transpose(-2, -1) * self.scale
        return scores if self.bias is None else scores + self.bias

    @property
    def softmax(self) -> Tensor:
        """The attention (B,H,M,N) that softmax gives, exactly zero for masked pairs."""
        return safe_softmax(self.scores, self.mask)


@dataclass(frozen=True)
class Intermediate:
    """One attention module in one forward pass.

    scores (B,H,M,N): scale·q kᵀ + bias. attention (B,H,M,N): σ, before dropout. mask: boolean, broadcastable to
    (B,H,M,N), True = takes part; None where there is none. In Swin B counts windows.
    """

    scores: Tensor
    attention: Tensor
    mask: Tensor | None = None


def split_mask(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(bias, boolean mask) of a mask that is boolean already or added to the scores.

    An additive entry of at most -100 means "masked" and becomes False: to a function that doesn't vanish at minus
    infinity such a number means nothing (SPEC §3). Other entries stay a bias.

    Raises ValueError for a mask of whole numbers, which may mean either.

    >>> split_mask(torch.tensor([0.0, 0.5, -100.0, -torch.inf]))
    (tensor([0.0000, 0.5000, 0.0000, 0.0000]), tensor([ True,  True, False, False]))
    """
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return None, attn_mask
    if not attn_mask.is_floating_point():
        raise ValueError(
            f"an attention mask is boolean (True = takes part) or added to the scores, got {attn_mask.dtype}; write "
            "mask.bool() where 1 means that a token takes part"
        )
    mask = attn_mask > MASKED
    return attn_mask.masked_fill(~mask, 0.0), mask


def token_inputs(attn: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> AttentionInputs:
    """The inputs of timm's `Attention`, ConViT's `MHSA` or the modules in their place, for tokens x (B,N,C)."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B,H,N,D) each
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    bias, mask = split_mask(attn_mask)
    N = x.shape[1]
    if is_causal:
        past = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
        mask = past if mask is None else mask & past
    positions: RelativeBias | None = getattr(attn, "position_bias", None)
    if positions is not None:
        relative = positions(None if attn.watch is None else attn.watch.grid_of(N, positions.prefix))
        bias = relative if bias is None else relative + bias
    return AttentionInputs(q, k, v, attn.scale, as_mask(bias), as_mask(mask))


def window_inputs(attn: Any, x: Tensor, mask: Tensor | None = None) -> AttentionInputs:
    """The inputs of Swin's `WindowAttention` or `KArAtWindowAttention` for windows x (B·windows, N, C).

    mask (windows, N, N) is timm's for shifted windows: 0, or -100 for pairs that aren't neighbours in the image.
    """
    B, N, _ = x.shape
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B,H,N,D) each
    bias = attn._get_rel_pos_bias()  # (1,H,N,N)
    if mask is not None:  # windows are the inner part of the batch axis
        pairs = split_mask(mask)[1]
        assert pairs is not None
        mask = pairs.expand(B // len(pairs), *pairs.shape).reshape(B, 1, N, N)
    return AttentionInputs(q, k, v, attn.scale, bias, mask)


# The order is that of the parameters in an optimiser, which saved ones rely on.
PARTS = ("qkv", "attn_drop", "proj", "proj_drop", "q_norm", "k_norm", "norm", "gate")


class _TakenOver(nn.Module):
    """What all modules below share: the parts taken over from `attn`, those that it lacks doing nothing."""

    parts: ClassVar[tuple[str, ...]] = PARTS

    qkv: nn.Linear
    attn_drop: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module
    norm: nn.Module
    gate: nn.Module | None

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.scale: float = attn.scale
        for name in self.parts:
            setattr(self, name, getattr(attn, name, None if name == "gate" else nn.Identity()))
        self.watch: GridWatch | None = None  # with dynamic_img_size, set by karatize
        self.position_bias: RelativeBias | None = None  # where the configuration asks for one, set by karatize
        self.train(attn.training)

    __prepare_scriptable__ = not_scripted

    @property
    def _dropout(self) -> float:
        """The probability of dropping an entry of σ now."""
        return self.attn_drop.p if isinstance(self.attn_drop, nn.Dropout) and self.training else 0.0

    def _finish(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What follows σ v: (B,H,N,D) -> (B,N,C), gated by the tokens x (B,N,C)."""
        out = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


class _AroundOperator(_TakenOver):
    """Modules with an operator, their own or shared.

    An operator shared between blocks is registered once, on the model; here it's a plain attribute, so that
    state_dict and parameters() hold it once. copy.deepcopy and pickle keep the sharing; moving the model moves it.
    """

    operator: KArAtOperator

    def __init__(self, attn: Any, operator: KArAtOperator, shared: bool = False) -> None:
        super().__init__(attn)
        if shared:
            self.__dict__["operator"] = operator  # past nn.Module's registration, see above
        else:
            self.operator = operator

    @property
    def elsewhere(self) -> str | None:
        """What it uses of other modules, which a graph of torch.fx would lack."""
        return SHARED if "operator" in self.__dict__ else None

    def present_operator(self, num_tokens: int) -> KArAtOperator:
        """The operator on the grid of images of so many tokens: another one than `operator` with dynamic_img_size."""
        return self.operator if self.watch is None else self.watch.operator(self.operator, num_tokens)

    def sigma(self, inputs: AttentionInputs) -> Tensor:
        """σ (B,H,M,N), before dropout."""
        scores = inputs.scores
        return self.present_operator(scores.shape[-1])(scores, inputs.mask)

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        """σ v of every head, (B,H,N,D)."""
        q, k, v, scale, bias, mask = inputs
        operator = self.present_operator(k.shape[2])
        return operator.attend(q, k, v, scale=scale, bias=bias, mask=mask, dropout_p=self._dropout)


class TokenAttention(_TakenOver, ABC):
    """In the place of timm's `Attention` or ConViT's `MHSA`, whose forward pass it has but for σ."""

    @abstractmethod
    def _attend(self, inputs: AttentionInputs) -> Tensor:
        """σ v of every head, (B,H,N,D)."""

    @one_node
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B,N,C); attn_mask boolean (True = takes part) or additive, broadcastable to (B,H,N,N)."""
        return self._finish(self._attend(token_inputs(self, x, attn_mask, is_causal)), x)


class KArAtAttention(_AroundOperator, TokenAttention):
    """timm's ViT `Attention`, or ConViT's `MHSA`, with a learnable operator instead of softmax.

    x (B,N,C) -> proj(gate · norm(concat_h σ_h(scale·q_h k_hᵀ + positions) v_h)); query and key norms, inner norm and
    gate are there where the replaced module has them, positions where `position_bias` is a `RelativeBias`.

    Raises ValueError for a number of tokens that isn't the operator's.
    """


class BiasedAttention(TokenAttention):
    """timm's ViT `Attention`, or ConViT's `MHSA`: softmax of scores with a relative position bias.

    x (B,N,C) -> proj(gate · norm(concat_h softmax(scale·q_h k_hᵀ + positions_h) v_h)), names as in `KArAtAttention`.
    """

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        return softmax_attention(*inputs, self._dropout)


class KArAtWindowAttention(_AroundOperator):
    """Swin's `WindowAttention` with a learnable operator instead of softmax (SPEC §3).

    The relative position bias is added to the scores that the operator sees; a pair of tokens that a shifted window
    masks adds exactly zero to the operator's sums and has exactly zero weight in σ.

    Raises ValueError for a window that isn't the operator's.
    """

    relative_position_index: Tensor

    def __init__(self, attn: Any, operator: KArAtOperator, shared: bool = False) -> None:
        super().__init__(attn, operator, shared)
        self.window_size: tuple[int, int] = attn.window_size
        self.window_area: int = attn.window_area
        self.relative_position_bias_table: nn.Parameter = attn.relative_position_bias_table
        self.register_buffer("relative_position_index", attn.relative_position_index, persistent=False)

    # timm's own handling of the bias table serves here too: it reads and writes the attributes above only.
    _get_rel_pos_bias = WindowAttention._get_rel_pos_bias
    _init_buffers = WindowAttention._init_buffers
    init_non_persistent_buffers = WindowAttention.init_non_persistent_buffers
    set_window_size = WindowAttention.set_window_size

    @one_node
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B·windows, N, C); mask (windows, N, N), 0 or -100, or boolean."""
        return self._finish(self._attend(window_inputs(self, x, mask)), x)


class TransferredAttention(_TakenOver):
    """The value path of an attention module, mixed by an attention that is handed in.

    x (B,N,C) -> proj(gate · norm(concat_h σ_t(h) v_h)) with v = x W_v; σ (B,T,N,N) has the teacher's T heads, and
    student head h of H takes teacher head t(h) = h·T // H. The replaced module's queries and keys are gone; its
    projection, dropouts, inner norm and gate are taken over, and its values are the linear map `values`.
    """

    parts = ("v", "attn_drop", "proj", "proj_drop", "norm", "gate")

    def __init__(self, attn: Any, values: nn.Linear) -> None:
        super().__init__(attn)
        self.v = values  # in its place among the parts
        self.given: Intermediate | None = None  # of the present batch, set by `karat.models.transfer`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B,N,C) -> (B,N,C); masks are the teacher's matter. Raises ValueError where no attention fits x."""
        if self.given is None:
            raise ValueError("no teacher has looked at these images: call the model itself, not a part of it")
        sigma = self.given.attention
        if sigma.shape[0] != x.shape[0] or sigma.shape[-1] != x.shape[1]:
            raise ValueError(
                f"the teacher's attention is for {sigma.shape[0]} x {sigma.shape[-1]} tokens, the student has "
                f"{x.shape[0]} x {x.shape[1]}"
            )
        v = self.v(x)  # (B,N,H·D); the H/T student heads of one teacher head lie side by side
        v = v.unflatten(-1, (sigma.shape[1], -1)).transpose(1, 2)  # (B,T,N,H·D/T)
        mixed = self.attn_drop(sigma.to(v.dtype)) @ v
        return self._finish(mixed, x)
