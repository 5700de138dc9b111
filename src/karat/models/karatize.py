"""Model surgery: softmax attention of a model taken out, learnable attention put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from karat.models.attach.example import Example
from karat.models.attach.mode import attached
from karat.models.attach.place import Sites, attach
from karat.models.attention import BiasedAttention
from karat.models.backbones import (
    OWN,
    AttentionSite,
    Backbone,
    attention_sites,
    backbone_of,
    is_unknown_attention,
    refusal,
)
from karat.models.differential import DifferentialAttention
from karat.models.exchange import exchange
from karat.models.regrid import check_holds_patch
from karat.models.relative_bias import RelativeBias, relative_biases
from karat.models.resample import SetInputSize
from karat.operator.config import KArAtConfig
from karat.operator.grids import GridWatch
from karat.operator.operator import KArAtOperator, karat_operators

SHARED_NAME = "karat_operator"


def karatize(model: nn.Module, config: KArAtConfig | str, example: Example | Sites | None = None) -> nn.Module:
    """Replace softmax by the learnable operator in any model with attention, in place (SPEC §3).

    timm's ViT, DeiT, ConViT and Swin are known and need no example. Of any other model one run of an example, which
    leaves it as it was, tells where it calls `F.scaled_dot_product_attention`, or softmax over the last axis of scores
    in a module that looks like attention. Such a module keeps its class and gains `operator`; while it runs, that one
    call goes to it. Where softmax was written out, σ is formed, as the scores were; entries ≤ −100 are masked. An
    operator is made for the example's number of keys: pad sequences to it.

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
        example: an input, a tuple of them or a dict of keyword arguments, of two images or more; None: made from the
            model's own input size (timm), or its configuration (transformers).

    Returns:
        The model. One warning names attention that stays softmax because it can't be served.

    Raises:
        ValueError: a model without attention that can be served, named with the reason; images smaller than a patch; no
            example, or one that the model can't take; pruned heads; universal sharing where heads or keys differ; a
            position_bias on Swin or on a model that isn't known; blocks out of range, softmax_heads ≥ H, patch dropout;
            or a model that is converted already: its attention is gone, so build a new one.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    >>> type(karatize(model, "g3b").blocks[0].attn).__name__
    'KArAtAttention'
    """
    config = KArAtConfig.parse(config)
    converted = next((s.name for s in attention_sites(model) if type(s.module) in OWN or s.kind.learned), None)
    if converted is not None:
        raise ValueError(f"the model is converted already ({converted} is an attention of karat's); build a new model")
    if config.leaves_attention:
        return model
    check_holds_patch(model)
    backbone = _known(model)
    if backbone is None:
        attach(model, config, example, lambda able, count: chosen_blocks(config, able, count), SHARED_NAME)
    else:
        _replace(model, backbone, config)
    finish(model, backbone)
    return model


def finish(model: nn.Module, backbone: Backbone | None) -> None:
    """What a model does beside its forward pass, for its operators too."""
    if SHARED_NAME in model._modules:
        model.register_forward_pre_hook(share_in_replica)
    model.no_weight_decay = NoWeightDecay(model)  # type: ignore[assignment]  # a method before
    if hasattr(type(model), "set_input_size"):
        model.set_input_size = SetInputSize(model)  # type: ignore[assignment]  # a method before
    if backbone is not None and getattr(model, "dynamic_img_size", False):
        _watch_grids(model)


def _replace(model: nn.Module, backbone: Backbone, config: KArAtConfig) -> None:
    """Modules of karat's in the places of a known model's."""
    sites = _chosen(model, config)
    sizes = [(int(site.module.num_heads), backbone.tokens(model, site.module)) for site in sites]
    biases = _position_biases(model, backbone, config, sites)
    if config.is_softmax:
        replacements: list[Any] = [BiasedAttention(site.module) for site in sites]
    elif not config.has_operator:
        blocks = [site.name for site in attention_sites(model)]
        replacements = [DifferentialAttention(site.module, blocks.index(site.name)) for site in sites]
    else:
        replacements = _learnable(model, backbone, config, sites, sizes)
    for new, bias in zip(replacements, biases, strict=True):
        new.position_bias = bias
    exchange(model, {site.module: new for site, new in zip(sites, replacements, strict=True)})


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


def share_in_replica(model: Any, _: Any) -> None:
    """A hook: the blocks of a copy that `nn.DataParallel` made share the copy's operator, not the original's."""
    if getattr(model, "_is_replica", False):
        for module in model.modules():
            place = attached(module)
            if place is not None and place.shared is not None:
                place.shared = model._modules[SHARED_NAME]
            elif type(module) in OWN and "operator" in module.__dict__:
                module.operator = model._modules[SHARED_NAME]


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


def _known(model: nn.Module) -> Backbone | None:
    """The record of this model; None where it has none or an attention that the record doesn't know.

    Raises ValueError for heads that were pruned in a model that has a record.
    """
    backbone, known = backbone_of(model), True
    for name, module in model.named_modules() if backbone is not None else ():
        reason = refusal(module)
        if reason is not None:
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) can't be converted: {reason}")
        known = known and not is_unknown_attention(module)
    return backbone if known else None


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

    Raises ValueError for an index that isn't there, and for no index at all.
    """
    if config.blocks is None:
        return list(able)
    if not config.blocks:
        raise ValueError(f"blocks={config.blocks} names no block, so nothing would learn; use attention='softmax'")
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
