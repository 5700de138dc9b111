"""Learnable attention in Hugging Face's ViT and DeiT: an implementation in transformers' registry of attentions.

>>> from transformers import ViTConfig, ViTForImageClassification
>>> config = ViTConfig(image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
>>> model = karatize_hf(ViTForImageClassification(config), "g3b")
>>> model(torch.zeros(1, 3, 32, 32)).logits.shape
torch.Size([1, 2])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.vit.modeling_vit import ViTAttention

from karat.models.attach.example import example_of, from_description
from karat.models.attach.find import find
from karat.models.attach.place import Sites
from karat.models.attention import split_mask
from karat.models.karatize import SHARED_NAME, NoWeightDecay, chosen_blocks, karatize
from karat.operator.config import KArAtConfig
from karat.operator.operator import KArAtOperator, factors_of
from karat.operator.rules import OF_GRIDS, refuse
from karat.ops.masks import safe_softmax, softmax_attention

NAME = "karat"
SETTING, EXAMPLE = "karat_attention", "karat_example"  # in the model's config.json
Model = TypeVar("Model", bound=PreTrainedModel)


def karat_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """σ(scaling · q kᵀ) v by `module.operator`, or by softmax in a block without one.

    q, k, v (B,H,N,D) -> (B,N,H,D), and σ (B,H,N,N) where the configuration's `output_attentions` asks for it: the very
    tensor that the values are summed with, so that gradients reach it.

    Raises ValueError in a model that lost its operators, which transformers' own loader leaves out.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias, mask = split_mask(attention_mask)
    operator: KArAtOperator | None = getattr(module, "operator", None)
    if operator is None and getattr(module.config, SETTING, None) and not isinstance(module, LearnableAttention):
        raise ValueError(
            f"this model has {SETTING}={getattr(module.config, SETTING)!r} in its config and no operators: load it "
            "with karat.integrations.transformers.from_pretrained"
        )
    sigma = None
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        scores = query @ key.transpose(-2, -1) * factor
        scores = scores if bias is None else scores + bias
        sigma = safe_softmax(scores, mask) if operator is None else operator(scores, mask)
        out = F.dropout(sigma, dropout) @ value
    elif operator is None:
        out = softmax_attention(query, key, value, factor, bias, mask, dropout)
    else:
        out = operator.attend(query, key, value, scale=factor, bias=bias, mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), sigma


class LearnableAttention:
    """What `karatize_hf` makes of transformers' attention: the same, but that no setting puts another function there.

    `set_attn_implementation("sdpa")` would compute softmax with the operators lying idle.
    """

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B,N,C) -> (B,N,C), and σ (B,H,N,N) where it is asked for."""
        shape, dropout = hidden_states.shape[:-1], self.attention_dropout if self.training else 0.0
        q, k, v = (
            proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, sigma = karat_attention_forward(self, q, k, v, attention_mask, self.scaling, dropout, **kwargs)
        return self.o_proj(out.reshape(*shape, -1)), sigma


class LearnableViTAttention(LearnableAttention, ViTAttention):
    """Of a ViT."""


class LearnableDeiTAttention(LearnableAttention, DeiTAttention):
    """Of a DeiT."""


SERVED: dict[type[nn.Module], type[nn.Module]] = {
    ViTAttention: LearnableViTAttention,
    DeiTAttention: LearnableDeiTAttention,
}
AttentionInterface.register(NAME, karat_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def karatize_hf(model: Model, config: KArAtConfig | str) -> Model:
    """Put learnable operators into a transformers ViT or DeiT, with any head on top, in place.

    Blockwise, the operators are `...attention.operator` of each layer; with sharing="universal" there is one,
    `karat_operator`, on the model. `model.config.karat_attention` notes the setting, so that `model.save_pretrained`
    keeps it and `from_pretrained` below finds it. The image size is the one in the model's configuration:
    interpolate_pos_encoding at another is refused by the operators. "softmax" leaves the model as it is.

    Args:
        model: any transformers model around ViTAttention or DeiTAttention; all other weights stay.
        config: a `KArAtConfig` or its short name; `blocks` indices count the layers.

    Raises:
        ValueError: a model without such attention, one that has operators already, blocks out of range, or
            softmax_heads that leave no head.
    """
    config = KArAtConfig.parse(config)
    places: list[Any] = [module for module in model.modules() if isinstance(module, tuple(SERVED))]
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no attention that karat knows; it knows transformers' ViT and DeiT"
        )
    if any(isinstance(place, LearnableAttention) for place in places):
        raise ValueError(f"this {type(model).__name__} has learnable attention already; build a new model")
    refuse(config, OF_GRIDS, "that is for timm's models, transformers' ViT takes none; leave it out")
    if config.is_softmax:
        return model
    chosen = chosen_blocks(config, range(len(places)), len(places))
    tokens = _tokens(model)
    operators: list[KArAtOperator] = []
    shared = config.sharing == "universal"
    for index in chosen:
        heads, weight = int(places[index].num_attention_heads), places[index].q_proj.weight
        new = operators[0] if shared and operators else KArAtOperator(heads, tokens, config)
        operators.append(new.to(device=weight.device, dtype=weight.dtype).train(model.training))
    if shared and operators:
        model.add_module(SHARED_NAME, operators[0])
    for index, operator in zip(chosen, operators, strict=True):
        if shared:
            places[index].__dict__["operator"] = operator  # registered once, on the model
        else:
            places[index].operator = operator
    for place in places:  # those without an operator too, for whom one function serves all masks
        place.__class__ = SERVED[type(place)]
    setattr(model.config, SETTING, str(config))
    model.set_attn_implementation("eager")  # the only one for which transformers lets attention be asked for
    model.config.attn_implementation = NAME  # in config.json: transformers' own loader doesn't pass over it silently
    model.no_weight_decay = NoWeightDecay(model)
    return model


def _tokens(model: PreTrainedModel) -> int:
    """N: a position embedding for each token."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Parameter):
            return int(positions.shape[1])
    raise ValueError(f"{type(model).__name__} has no position embeddings to count its tokens by")


def _model_class(auto: Any, config: Any) -> Any:
    """The class that an Auto class stands for; ValueError where it has none of this configuration."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        raise ValueError(f"{auto.__name__} has no model of {type(config).__name__}: name the model's class") from None
    return found[0] if isinstance(found, tuple) else found


def from_pretrained(kind: type[Model], name_or_folder: str | Path, **options: Any) -> Model:
    """A model that `karatize_hf` or `karat.karatize` converted and its own save_pretrained or push_to_hub saved.

    Operators are included; config.json says where they are and what they are made of.

    Args:
        kind: its class, such as ViTForImageClassification, or one of transformers' Auto classes.
        options: as `kind.from_pretrained` takes them.

    Raises:
        ValueError: no such model, a config without learnable attention, or weights that are missing or left over.
    """
    reader = AutoConfig if getattr(kind, "_model_mapping", None) is not None else kind.config_class
    try:
        config = reader.from_pretrained(name_or_folder, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_folder} can't be read: {' '.join(str(error).split())}") from None
    if reader is AutoConfig:
        kind = _model_class(kind, config)
    spec = getattr(config, SETTING, None)
    if spec is None:
        raise ValueError(f"{name_or_folder} has no {SETTING!r} in its config: load it with {kind.__name__} itself")

    sites = None
    if hasattr(config, EXAMPLE):  # by karatize; weights come later, and an example needs some
        config = reader.from_pretrained(name_or_folder)  # its attention calls what it called
        with torch.random.fork_rng(devices=()):
            plain, twin = getattr(config, EXAMPLE), kind(config)
        sites = Sites(find(twin, example_of(twin) if plain is None else from_description(plain)))

    class Converted(kind):  # type: ignore[valid-type,misc]  # a base chosen at run time
        """`kind`, with its operators from the start, so that transformers' loader fills them too."""

        def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
            super().__init__(config, *arguments, **keywords)
            if sites is None:
                karatize_hf(self, str(spec))
            else:
                karatize(self, str(spec), sites)

    # As one of transformers' own it has their renaming of saved weights, which goes by the class's module and name.
    Converted.__name__, Converted.__module__ = kind.__name__, kind.__module__
    loaded, report = Converted.from_pretrained(name_or_folder, config=config, output_loading_info=True, **options)
    factors = factors_of(loaded)  # what was saved before there were any was trained with factors of one
    ones = {name for name in report.get("missing_keys") or () if name in factors}
    for name in ones:
        loaded.get_buffer(name).fill_(1.0)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(set(map(str, report.get(what) or ())) - ones)
        if names:
            raise ValueError(f"{name_or_folder}: {what.replace('_', ' ')} {', '.join(names[:3])}")
    loaded.__class__ = kind
    return loaded
