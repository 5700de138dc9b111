"""Learnable attention to hand to timm where it builds a ViT: `attn_layer=` of its VisionTransformer."""

from __future__ import annotations

import copyreg
from traceback import walk_stack
from typing import Any

from timm.layers import Attention
from torch import nn

from karat.models.attention import KArAtAttention
from karat.models.backbones import BACKBONES, backbone_of
from karat.models.karatize import NoWeightDecay, finish, like_attention
from karat.operator.config import KArAtConfig
from karat.operator.grids import GridWatch
from karat.operator.operator import KArAtOperator
from karat.operator.rules import OF_MODELS, refuse


class AttentionLayer(type):
    """A class to timm, which builds attention by calling it: timm's own `Attention` with an operator in it."""

    config: KArAtConfig
    num_tokens: int

    def __call__(cls, dim: int, num_heads: int = 8, **settings: Any) -> KArAtAttention:
        """The attention of one block; settings are those of timm's `Attention`."""
        attn = Attention(dim, num_heads=num_heads, **settings)
        operator = like_attention(KArAtOperator(num_heads, cls.num_tokens, cls.config), attn)
        made = KArAtAttention(attn, operator)
        _finish_model_around(made)
        return made


def attn_layer(config: KArAtConfig | str, num_tokens: int) -> AttentionLayer:
    """Attention with a learnable operator, for `timm.create_model(name, attn_layer=...)`.

    The second way to a converted ViT or DeiT: the model is the one that `karat.karatize` gives, and its
    `no_weight_decay`, `set_input_size` and dynamic_img_size know of its operators. In another model of yours the layer
    is built as timm's `Attention` is, `layer(dim, num_heads=3, qkv_bias=True)`. timm's parallel blocks
    (block_fn=ParallelScalingBlock) take no attn_layer and stay as they are.

    Args:
        config: a `KArAtConfig` or its short name, such as "g3b".
        num_tokens: N, the model's patches and prefix tokens: 197 for 224 pixels, patches of 16 and a class token.

    Raises:
        ValueError: softmax, and what belongs to whole models: universal sharing, `blocks`, `position_bias`. When the
            model is built: one of another number of tokens, or of a number that varies.

    >>> import timm
    >>> small = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
    >>> model = timm.create_model("vit_tiny_patch16_224", attn_layer=attn_layer("g3b", num_tokens=5), **small)
    >>> model.blocks[1].attn.operator.num_tokens
    5
    """
    config = KArAtConfig.parse(config)
    if type(num_tokens) is not int or num_tokens < 1:
        raise ValueError(f"num_tokens must be a whole number >= 1, got {num_tokens!r}")
    if config.is_softmax:
        raise ValueError(f"attention={str(config)!r} has no operator: leave attn_layer out")
    why = "a layer doesn't know the blocks and tokens of its model; build the model and convert it"
    refuse(config, OF_MODELS, f"{why}, karat.karatize(model, {str(config)!r})")
    return AttentionLayer("AttentionLayer", (nn.Module,), {"config": config, "num_tokens": num_tokens})


copyreg.pickle(AttentionLayer, lambda layer: (attn_layer, (layer.config, layer.num_tokens)))  # timm keeps it in models


def _finish_model_around(attn: KArAtAttention) -> None:
    """Finish the model in whose constructor this is, where karat has a record of it, as far as it is built.

    timm tells its layers nothing of their model: it is found among the callers. Raises ValueError for another number
    of tokens, or one that varies.
    """
    model: Any = next((m for frame, _ in walk_stack(None) if backbone_of(m := frame.f_locals.get("self"))), None)
    if model is None or "patch_embed" not in model.__dict__.get("_modules", {}):
        return
    backbone = backbone_of(model)
    assert backbone is not None
    own, tokens = attn.operator.num_tokens, backbone.tokens(model, attn)
    if own != tokens and type(model) in BACKBONES:  # a subclass may add tokens yet, as DeiT does
        raise ValueError(f"attn_layer has num_tokens={own}, and the model {tokens} tokens; give num_tokens={tokens}")
    if not isinstance(model.__dict__.get("no_weight_decay"), NoWeightDecay):
        finish(model, backbone)
    attn.watch = next((h for h in model.patch_embed._forward_hooks.values() if isinstance(h, GridWatch)), None)
