"""Model surgery: softmax attention of a timm model taken out, learnable attention put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from karat.models.attention import BiasedAttention
from karat.models.backbones import BACKBONES, OWN, AttentionSite, Backbone, attention_sites, backbone_of, refusal
from karat.models.relative_bias import RelativeBias, relative_biases
from karat.models.resample import SetInputSize
from karat.operator.config import KArAtConfig
from karat.operator.grids import GridWatch
from karat.operator.operator import KArAtOperator, karat_operators

SHARED_NAME = "karat_operator"


def karatize(model: nn.Module, config: KArAtConfig | str) -> nn.Module:
    """Replace softmax by the learnable operator in a timm ViT, DeiT, ConViT or Swin, in place (SPEC §3).

    Blockwise, each converted attention has its own operator, `blocks.3.attn.operator.*` in the state dict; with
    sharing="universal" there is one, `karat_operator.*`, that all of them use. All other weights keep their names
    and values. Device and precision of each operator are those of its attention; `no_weight_decay()` of the model
    names the operators' parameters too. "softmax" leaves the model as it is, but for a `position_bias`. Such a bias is
    `blocks.3.attn.position_bias.*`, each attention's own with either sharing.

    The model's own `set_input_size` resamples the operators from then on, and with timm's dynamic_img_size=True they
    follow the size of the images at hand (see docs/tokens.md).

    Args:
        model: the model; it must not be wrapped (DDP, torch.compile) yet.
        config: a `KArAtConfig` or its short name, such as "g3b". `blocks` indices count the model's attention
            modules in forward order; in ConViT only the last blocks, which aren't gated, can be converted. "first"
            counts those that can be converted.

    Returns:
        The model.

    Raises:
        ValueError: a model or attention that isn't served (rotary embeddings, pruned heads, other classes; named
            with the reason), universal sharing or a position_bias on Swin, blocks out of range, softmax_heads ≥ H,
            patch dropout, or a model that is converted already: its attention is gone, so build a new one.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    >>> type(karatize(model, "g3b").blocks[0].attn).__name__
    'KArAtAttention'
    """
    config = KArAtConfig.parse(config)
    converted = next((site.name for site in attention_sites(model) if type(site.module) in OWN), None)
    if converted is not None:
        raise ValueError(f"the model is converted already ({converted} is an attention of karat's); build a new model")
    if config.leaves_attention:
        return model
    backbone = _served(model)
    sites = _chosen(model, config)
    sizes = [(int(site.module.num_heads), backbone.tokens(model, site.module)) for site in sites]
    biases = _position_biases(model, backbone, config, sites)
    if config.is_softmax:
        replacements: list[Any] = [BiasedAttention(site.module) for site in sites]
    else:
        replacements = _learnable(model, backbone, config, sites, sizes)
    for site, new, bias in zip(sites, replacements, biases, strict=True):
        new.position_bias = bias
        parent, _, child = site.name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.no_weight_decay = NoWeightDecay(model)  # type: ignore[assignment]  # a method before
    if hasattr(type(model), "set_input_size"):
        model.set_input_size = SetInputSize(model)  # type: ignore[assignment]  # a method before
    if getattr(model, "dynamic_img_size", False):
        _watch_grids(model)
    return model


def _learnable(
    model: nn.Module, backbone: Backbone, config: KArAtConfig, sites: list[AttentionSite], sizes: list[tuple[int, int]]
) -> list[nn.Module]:
    """The attention around operators for each place; a shared operator is put on the model."""
    shared = config.sharing == "universal"
    if shared:
        _check_shareable(backbone, sites, sizes)
    # All operators first: an error leaves the model as it was.
    operators: list[KArAtOperator] = []
    for site, size in zip(sites, sizes, strict=True):
        new = operators[0] if shared and operators else KArAtOperator(*size, config)
        operators.append(like_attention(new, site.module))
    if shared and operators:
        model.add_module(SHARED_NAME, operators[0])
    found: list[nn.Module] = []
    for site, operator in zip(sites, operators, strict=True):
        assert site.kind.adapter is not None
        found.append(site.kind.adapter(site.module, operator, shared))
    return found


def _position_biases(
    model: Any, backbone: Backbone, config: KArAtConfig, sites: list[AttentionSite]
) -> Sequence[RelativeBias | None]:
    """A fresh bias for each place, or None where the configuration has none."""
    if config.position_bias is None:
        return [None] * len(sites)
    if backbone.prefix is None:
        raise ValueError(
            f"position_bias={config.position_bias!r}: {type(model).__name__} has relative position biases of its own; "
            "leave the option out"
        )
    grid, prefix = tuple(model.patch_embed.grid_size), backbone.prefix(model)
    return [like_attention(RelativeBias(site.module.num_heads, grid, prefix), site.module) for site in sites]


Part = TypeVar("Part", bound=nn.Module)


def like_attention(part: Part, attn: Any) -> Part:
    """A new part of an attention module on its device, in its precision and mode."""
    weight = attn.qkv.weight
    return part.to(device=weight.device, dtype=weight.dtype).train(attn.training)


def _watch_grids(model: Any) -> None:
    """Let every attention of ours know on which grid the tokens at hand lie."""
    watch = GridWatch(model)
    model.patch_embed.register_forward_hook(watch)
    for site in attention_sites(model):
        if type(site.module) in OWN:
            site.module.watch = watch


class NoWeightDecay:
    """timm's `model.no_weight_decay()` with the operators' parameters added: coefficients, scales, gates, W and C; and
    relative position biases.

    Decay pulls every edge function towards zero, and with it the whole attention. An object and not a closure, so
    that a copied or pickled model asks its own parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> set[str]:
        own = getattr(type(self.model), "no_weight_decay", None)
        return (set() if own is None else set(own(self.model))) | {
            f"{prefix}.{name}"
            for prefix, part in (karat_operators(self.model) | relative_biases(self.model)).items()
            for name, _ in part.named_parameters()
        }


def _served(model: nn.Module) -> Backbone:
    """What is known of this model; ValueError if it or an attention in it isn't served."""
    for name, module in model.named_modules():
        reason = refusal(module)
        if reason is not None:
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) can't be converted: {reason}")
    backbone = backbone_of(model)
    if backbone is None:
        known = ", ".join(family.__name__ for family in BACKBONES)
        raise ValueError(
            f"{type(model).__name__} has no attention that karat knows how to convert; it knows timm's {known}, not "
            "wrapped"
        )
    return backbone


def _chosen(model: nn.Module, config: KArAtConfig) -> list[AttentionSite]:
    """The attention modules that the configuration converts."""
    sites = attention_sites(model)
    able = [i for i, site in enumerate(sites) if site.kind.adapter is not None]
    if not able:
        raise ValueError(f"{type(model).__name__} has no attention that can be converted")
    chosen = chosen_blocks(config, able, len(sites))
    for i in chosen:
        if sites[i].kind.adapter is None:
            raise ValueError(
                f"blocks={config.blocks}: {sites[i].name} is {sites[i].kind.stays}, which stays; "
                f"blocks that can be converted: {', '.join(map(str, able))}"
            )
    return [sites[i] for i in chosen]


def chosen_blocks(config: KArAtConfig, able: Sequence[int], count: int) -> list[int]:
    """The blocks that a configuration converts, ascending, of `count`, those `able` to be.

    Raises ValueError for an index that isn't there.
    """
    if config.blocks is None:
        return list(able)
    if isinstance(config.blocks, str):  # "first"
        return list(able[: (len(able) + 1) // 2])
    for i in config.blocks:
        if i >= count:
            raise ValueError(f"blocks={config.blocks}: there is no block {i}; the model has blocks 0 to {count - 1}")
    return sorted(config.blocks)


def _check_shareable(backbone: Backbone, sites: list[AttentionSite], sizes: list[tuple[int, int]]) -> None:
    if not backbone.universal:
        raise ValueError(
            "sharing='universal' can't serve Swin: its stages have different numbers of heads; use sharing='blockwise' "
            "(g3b instead of g3u)"
        )
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{site.name} {heads}x{n}" for site, (heads, n) in zip(sites, sizes, strict=True))
        raise ValueError(f"sharing='universal' needs equal heads and tokens in all blocks, got {listed}")
