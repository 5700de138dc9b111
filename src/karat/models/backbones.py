"""What karat knows of each family of models and each class of attention: one record a family, in BACKBONES."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.models.convit import GPSA, MHSA, ConVit
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from karat.models.attach.mode import attached
from karat.models.attention import (
    AttentionInputs,
    BiasedAttention,
    Intermediate,
    KArAtAttention,
    KArAtWindowAttention,
    TransferredAttention,
    token_inputs,
    window_inputs,
)
from karat.models.differential import DifferentialAttention, differential
from karat.models.evaluating import evaluating
from karat.models.regrid import resample_convit, resample_swin, resample_vit, resize_grid, resize_windows
from karat.operator.operator import KArAtOperator


def fused_values(attn: Any) -> nn.Linear:
    """The values' linear map of a fused qkv, its last third: a copy."""
    qkv: nn.Linear = attn.qkv
    width, bias = qkv.out_features // 3, qkv.bias is not None
    like = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
    v: nn.Linear = nn.utils.skip_init(nn.Linear, qkv.in_features, width, bias=bias, **like)
    with torch.no_grad():
        v.weight.copy_(qkv.weight[2 * width :])
        if bias:
            v.bias.copy_(qkv.bias[2 * width :])
    return v


@dataclass(frozen=True)
class AttentionKind:
    """What karat knows of one class of attention; not of its subclasses, which may compute something else.

    Args:
        inputs: (attention, arguments of its forward) -> queries, keys, values and the rest; None: it has none to give.
        adapter: (attention, operator, shared) -> the module that takes its place; None: it can't be converted.
        observe: (attention, arguments) -> what `karat.record` hands out; None: σ of `inputs`.
        values: attention -> the linear map of its values, the part that attention transfer keeps.
        learned: whether σ is an operator's, in a module of karat's.
        windows: whether its tokens are those of a window.
        stays: what it is called where it can't be converted.
    """

    inputs: Callable[..., AttentionInputs] | None
    adapter: Callable[[nn.Module, KArAtOperator, bool], nn.Module] | None = None
    observe: Callable[..., Intermediate] | None = None
    values: Callable[[Any], nn.Linear] = fused_values
    learned: bool = False
    windows: bool = False
    stays: str = ""

    def look(self, attn: Any, *args: Any, **kwargs: Any) -> Intermediate:
        """Scores and attention of a module of this kind, called with these arguments."""
        if self.observe is not None:
            return self.observe(attn, *args, **kwargs)
        assert self.inputs is not None
        inputs: AttentionInputs = self.inputs(attn, *args, **kwargs)
        return Intermediate(inputs.scores, attn.sigma(inputs) if self.learned else inputs.softmax, inputs.mask)


def _gated_positional(attn: Any, x: Tensor) -> Intermediate:
    """ConViT's GPSA: scores are its content scores; attention is their softmax, mixed with the positional one."""
    q, k = attn.qk(x).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    with evaluating(attn.attn_drop):  # as everywhere here, attention before dropout
        return Intermediate(q @ k.transpose(-2, -1) * attn.scale, attn.get_attention(x))


TOKENS = AttentionKind(token_inputs, KArAtAttention)
WINDOWS = AttentionKind(window_inputs, KArAtWindowAttention, windows=True)
GATED = AttentionKind(  # SPEC §3
    None, observe=_gated_positional, values=lambda attn: attn.v, stays="gated positional attention (GPSA)"
)

# karat's own modules, in the places of others.
OWN: dict[type[nn.Module], AttentionKind] = {
    BiasedAttention: AttentionKind(token_inputs),
    DifferentialAttention: AttentionKind(None, observe=differential, stays="differential attention"),
    KArAtAttention: AttentionKind(token_inputs, learned=True),
    KArAtWindowAttention: AttentionKind(window_inputs, learned=True, windows=True),
    TransferredAttention: AttentionKind(
        None, observe=lambda attn, *args, **kwargs: attn.given, stays="its teacher's attention"
    ),
}


def _no_look(attn: Any, *args: Any, **kwargs: Any) -> Intermediate:
    raise ValueError(
        f"scores and attention of {type(attn).__name__} are seen while it runs, by karat.record, and not beside it"
    )


# Attention of a model that is not known, with a learnable operator where it calls for attention, or as it was.
ATTACHED: dict[tuple[bool, bool], AttentionKind] = {
    (learned, windows): AttentionKind(None, observe=_no_look, learned=learned, windows=windows)
    for learned in (False, True)
    for windows in (False, True)
}


@dataclass(frozen=True)
class Backbone:
    """What karat knows of one family of models.

    Args:
        tokens: (model, attention) -> N, how many tokens reach that attention. Raises ValueError where N varies.
        attentions: the classes of attention that it has, and what is known of them.
        prefix: model -> how many tokens come before their grid; None: it takes no `position_bias`, having its own.
        resample: (model, img_size, num_prefix_tokens, window_size) -> None, `karat.resample_tokens` of this family,
            as in `karat.models.regrid`; None: it has none.
        resize: (model, arguments of its `set_input_size`) -> None: that method of its class, operators included.
        arguments: model -> what it must be built with, beside its image size, to be as it is now.
        universal: whether one operator may serve all blocks.
        plain: whether a detector can run its blocks on grids of tokens without prefix.
    """

    tokens: Callable[[Any, Any], int]
    attentions: Mapping[type[nn.Module], AttentionKind] = field(default_factory=lambda: {Attention: TOKENS})
    prefix: Callable[[Any], int] | None = None
    resample: Callable[..., None] | None = None
    resize: Callable[..., None] = resize_grid
    arguments: Callable[[Any], dict[str, Any]] = lambda model: {}
    universal: bool = True
    plain: bool = False

    @property
    def windows(self) -> bool:
        """Whether its attention is cut into windows."""
        return any(kind.windows for kind in self.attentions.values())


def _vit_tokens(model: Any, attn: nn.Module) -> int:
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            "patch_drop_rate > 0 changes the number of tokens at random, the operator needs it fixed; build the "
            "model with patch_drop_rate=0"
        )
    return _patches(model) + int(model.num_prefix_tokens)


def _class_token(model: Any) -> int:
    """ConViT's MHSA blocks come after the class token is added."""
    return int(model.cls_token is not None)


def _patches(model: Any) -> int:
    if model.patch_embed.num_patches is None:
        raise ValueError("the model has no fixed image size, the operator needs a number of tokens; give img_size=")
    return int(model.patch_embed.num_patches)


def _swin_windows(model: Any) -> dict[str, Any]:
    """Windows grow with the image, or were changed alone."""
    return {"window_size": tuple(tuple(stage.blocks[0].window_size) for stage in model.layers)}


# A new backbone is one entry; its subclasses are served as it is.
BACKBONES: dict[type[nn.Module], Backbone] = {
    VisionTransformer: Backbone(  # DeiT too
        _vit_tokens, prefix=lambda model: int(model.num_prefix_tokens), resample=resample_vit, plain=True
    ),
    ConVit: Backbone(
        lambda model, attn: _patches(model) + _class_token(model),
        attentions={MHSA: TOKENS, GPSA: GATED},
        prefix=_class_token,
        resample=resample_convit,
    ),
    SwinTransformer: Backbone(
        lambda model, attn: int(attn.window_area),
        attentions={WindowAttention: WINDOWS},
        resample=resample_swin,
        resize=resize_windows,
        arguments=_swin_windows,
        universal=False,
    ),
}


def backbone_of(model: nn.Module | None) -> Backbone | None:
    """What is known of a model: the record of its class or of the nearest it descends from; None if there is none."""
    return next((BACKBONES[kind] for kind in type(model).__mro__ if kind in BACKBONES), None)


def attention_kinds() -> dict[type[nn.Module], AttentionKind]:
    """Every class of attention that is known, the backbones' and karat's own."""
    found: dict[type[nn.Module], AttentionKind] = {}
    for backbone in BACKBONES.values():
        found |= backbone.attentions
    return found | OWN


def kind_of(module: nn.Module) -> AttentionKind | None:
    """What is known of an attention module; None of any other."""
    place = attached(module)
    return attention_kinds().get(type(module)) if place is None else ATTACHED[place.learned, place.windows]


class AttentionSite(NamedTuple):
    """An attention module of a model, its dotted name and its kind."""

    name: str
    module: Any
    kind: AttentionKind


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Every attention that karat knows, converted or not, in forward order.

    The index in this list is what `KArAtConfig.blocks` means: for ViT and ConViT the block, for Swin the block
    counted through all stages.
    """
    kinds = attention_kinds()
    places = [(name, module, attached(module)) for name, module in model.named_modules()]
    found = [
        (place.index, AttentionSite(name, module, ATTACHED[place.learned, place.windows]))
        for name, module, place in places
        if place
    ]
    if found:
        return [site for _, site in sorted(found, key=lambda pair: pair[0])]
    return [
        AttentionSite(name, module, kinds[type(module)])
        for name, module in model.named_modules()
        if type(module) in kinds
    ]


def refusal(module: nn.Module) -> str | None:
    """Why `module`, an attention that is known, can't be converted; None if it can, or if it isn't known."""
    kind = attention_kinds().get(type(module))
    return None if kind is None or kind.adapter is None else _pruned(module, kind)


def is_unknown_attention(module: nn.Module) -> bool:
    """Whether `module` looks like an attention that no record knows; pooling by attention isn't one of the blocks'."""
    kind = type(module)
    looks_like_attention = hasattr(module, "attn_drop") or re.search("attention|attn", kind.__name__, re.IGNORECASE)
    return kind not in attention_kinds() and bool(looks_like_attention) and "Pool" not in kind.__name__


def _pruned(attn: Any, kind: AttentionKind) -> str | None:
    """Why the projections don't fit the number of heads, if they don't."""
    qkv, proj, heads = attn.qkv, attn.proj, attn.num_heads
    width, inner = getattr(qkv, "in_features", None), getattr(qkv, "out_features", None)
    if width is None or inner is None or not hasattr(proj, "in_features"):
        return "its qkv or its projection is no linear layer"
    attn_dim = heads * getattr(attn, "head_dim", proj.in_features // heads)
    pruned = bool(getattr(attn, "pruned_heads", None))
    if pruned or inner != 3 * attn_dim or proj.in_features != attn_dim:
        return f"heads were pruned: {heads} heads, a qkv of {inner} and a projection of {proj.in_features} don't agree"
    if not kind.windows and attn_dim < width:  # Swin may be built with narrow heads
        return f"heads were pruned: its {heads} heads are {attn_dim} wide, the model {width}"
    return None
