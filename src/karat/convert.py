"""Model surgery: softmax attention of a timm model taken out, learnable attention put in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models.convit import GPSA, ConVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from karat.attention import ADAPTERS, CONVERTED, KEPT, refusal
from karat.config import KArAtConfig
from karat.grids import GridWatch
from karat.operator import KArAtOperator, karat_operators
from karat.resample import SetInputSize

SHARED_NAME = "karat_operator"


def _vit_tokens(model: Any, attn: nn.Module) -> int:
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            "patch_drop_rate > 0 changes the number of tokens at random, the operator needs it fixed; build the "
            "model with patch_drop_rate=0"
        )
    return _patches(model) + int(model.num_prefix_tokens)


def _convit_tokens(model: Any, attn: nn.Module) -> int:
    return _patches(model) + int(model.cls_token is not None)  # MHSA blocks come after the class token is added


def _swin_tokens(model: Any, attn: Any) -> int:
    return int(attn.window_area)


def _patches(model: Any) -> int:
    if model.patch_embed.num_patches is None:
        raise ValueError("the model has no fixed image size, the operator needs a number of tokens; give img_size=")
    return int(model.patch_embed.num_patches)


# The models that are served, and how many tokens reach an attention of theirs.
FAMILIES: dict[type[nn.Module], Callable[[Any, Any], int]] = {
    VisionTransformer: _vit_tokens,  # DeiT too
    ConVit: _convit_tokens,
    SwinTransformer: _swin_tokens,
}


class AttentionSite(NamedTuple):
    """An attention module of a model and its dotted name."""

    name: str
    module: Any


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Every attention that karat knows, converted or not, in forward order.

    The index in this list is what `KArAtConfig.blocks` means: for ViT and ConViT the block, for Swin the block
    counted through all stages.
    """
    known = (*ADAPTERS, *KEPT, *CONVERTED)
    return [AttentionSite(name, module) for name, module in model.named_modules() if isinstance(module, known)]


def karatize(model: nn.Module, config: KArAtConfig | str) -> nn.Module:
    """Replace softmax by the learnable operator in a timm ViT, DeiT, ConViT or Swin, in place (SPEC §3).

    Blockwise, each converted attention has its own operator, `blocks.3.attn.operator.*` in the state dict; with
    sharing="universal" there is one, `karat_operator.*`, that all of them use. All other weights keep their names
    and values. Device and precision of each operator are those of its attention; `no_weight_decay()` of the model
    names the operators' parameters too. "softmax" leaves the model as it is.

    The model's own `set_input_size` resamples the operators from then on, and with timm's dynamic_img_size=True they
    follow the size of the images at hand (see docs/tokens.md).

    Args:
        model: the model; it must not be wrapped (DDP, torch.compile) yet.
        config: a `KArAtConfig` or its short name, such as "g3b". `blocks` indices count the model's attention
            modules in forward order; in ConViT only the last blocks, which aren't gated, can be converted.

    Returns:
        The model.

    Raises:
        ValueError: a model or attention that isn't served (rotary embeddings, pruned heads, other classes; named
            with the reason), universal sharing on Swin, blocks out of range, softmax_heads ≥ H, patch dropout, or a
            model that is converted already: its attention is gone, so build a new one.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    >>> type(karatize(model, "g3b").blocks[0].attn).__name__
    'KArAtAttention'
    """
    config = KArAtConfig.parse(config)
    converted = next((name for name, module in model.named_modules() if isinstance(module, CONVERTED)), None)
    if converted is not None:
        raise ValueError(f"the model is converted already ({converted} is learnable attention); build a new model")
    if config.is_softmax:
        return model
    tokens = _token_counter(model)
    sites = _chosen(model, config)
    sizes = [(int(site.module.num_heads), tokens(model, site.module)) for site in sites]
    shared = config.sharing == "universal"
    if shared:
        _check_shareable(model, sites, sizes)
    # All operators first: an error leaves the model as it was.
    operators: list[KArAtOperator] = []
    for site, size in zip(sites, sizes, strict=True):
        new = operators[0] if shared and operators else KArAtOperator(*size, config)
        weight = site.module.qkv.weight
        operators.append(new.to(device=weight.device, dtype=weight.dtype).train(site.module.training))
    if shared and operators:
        model.add_module(SHARED_NAME, operators[0])
    for site, operator in zip(sites, operators, strict=True):
        parent, _, child = site.name.rpartition(".")
        adapter = ADAPTERS[type(site.module)]
        setattr(model.get_submodule(parent), child, adapter(site.module, operator, shared))
    model.no_weight_decay = NoWeightDecay(model)  # type: ignore[assignment]
    if hasattr(type(model), "set_input_size"):
        model.set_input_size = SetInputSize(model)  # type: ignore[assignment]
    if getattr(model, "dynamic_img_size", False):
        _watch_grids(model)
    return model


def _watch_grids(model: Any) -> None:
    """Let every learnable attention know on which grid the tokens at hand lie."""
    watch = GridWatch(model)
    model.patch_embed.register_forward_hook(watch)
    for site in attention_sites(model):
        if isinstance(site.module, CONVERTED):
            site.module.watch = watch


class NoWeightDecay:
    """timm's `model.no_weight_decay()` with the operators' parameters added: coefficients, scales, gates and W.

    Decay pulls every edge function towards zero, and with it the whole attention. An object and not a closure, so
    that a copied or pickled model asks its own parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> set[str]:
        own = getattr(type(self.model), "no_weight_decay", None)
        return (set() if own is None else set(own(self.model))) | {
            f"{prefix}.{name}"
            for prefix, operator in karat_operators(self.model).items()
            for name, _ in operator.named_parameters()
        }


def _token_counter(model: nn.Module) -> Callable[[Any, Any], int]:
    """How tokens are counted in this model; ValueError if it or an attention in it isn't served."""
    for name, module in model.named_modules():
        reason = refusal(module)
        if reason is not None:
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) can't be converted: {reason}")
    for family, counter in FAMILIES.items():
        if isinstance(model, family):
            return counter
    known = ", ".join(family.__name__ for family in FAMILIES)
    raise ValueError(
        f"{type(model).__name__} has no attention that karat knows how to convert; it knows timm's {known}, not wrapped"
    )


def _chosen(model: nn.Module, config: KArAtConfig) -> list[AttentionSite]:
    """The attention modules that the configuration converts."""
    sites = attention_sites(model)
    able = [i for i, site in enumerate(sites) if type(site.module) in ADAPTERS]
    if not able:
        raise ValueError(f"{type(model).__name__} has no attention that can be converted")
    if config.blocks is None:
        return [sites[i] for i in able]
    for i in config.blocks:
        if not 0 <= i < len(sites):
            raise ValueError(
                f"blocks={config.blocks}: there is no block {i}; the model has blocks 0 to {len(sites) - 1}"
            )
        if isinstance(sites[i].module, GPSA):
            raise ValueError(
                f"blocks={config.blocks}: {sites[i].name} is gated positional attention (GPSA), which stays; "
                f"blocks that can be converted: {', '.join(map(str, able))}"
            )
    return [sites[i] for i in sorted(config.blocks)]


def _check_shareable(model: nn.Module, sites: list[AttentionSite], sizes: list[tuple[int, int]]) -> None:
    if isinstance(model, SwinTransformer):
        raise ValueError(
            "sharing='universal' can't serve Swin: its stages have different numbers of heads; use sharing='blockwise' "
            "(g3b instead of g3u)"
        )
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{site.name} {heads}x{n}" for site, (heads, n) in zip(sites, sizes, strict=True))
        raise ValueError(f"sharing='universal' needs equal heads and tokens in all blocks, got {listed}")
