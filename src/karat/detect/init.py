"""A detector from other weights (`--init`): its trunk from a classifier, or all of it from a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat import runs
from karat.detect.detector import Detector
from karat.detect.measure import load_run
from karat.detect.settings import DetectSettings
from karat.detect.trunk import Trunk, resize_embeddings, to_grid
from karat.models.backbones import AttentionKind, backbone_of, kind_of
from karat.models.create import create_model
from karat.models.fit import check_numbers, fit, places_of_weights
from karat.models.kan.mlp import refuse_other_form
from karat.models.resample import resample_tokens
from karat.operator.operator import with_factors, without_torn_layers
from karat.operator.token_grid import resample_operator
from karat.runs.weights import Given
from karat.train.init import FRESH, Transplanted, assumed, other_classes, other_meaning, read_source, transplant

# Layers with one output a class.
BY_CLASS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def load_init(detector: Detector, settings: DetectSettings, class_names: Sequence[str] = ()) -> list[Transplanted]:
    """Give the detector the weights that `settings.init` names, as far as they fit; what became of each part.

    A detector's run gives everything, the last layers where the classes are the same; anything else gives the trunk.
    class_names: of the detector, empty where they aren't known.
    Raises ValueError as `karat.train.init` does.
    """
    assert settings.init is not None
    folder = Path(settings.init)
    if runs.is_run(folder) and runs.task_of(folder) == DetectSettings.task:
        return _load_detector(detector, settings, folder, class_names)
    return load_trunk(detector, settings)


def _load_detector(
    detector: Detector, settings: DetectSettings, folder: Path, class_names: Sequence[str]
) -> list[Transplanted]:
    source, theirs, categories = load_run(folder)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    _carry(source.trunk, settings.recipe.img_size // detector.trunk.stride)
    weights = source.state_dict()
    check_numbers(weights, detector.state_dict(), f"--init {folder}: ")
    given = Given(str(folder), weights, source, theirs.attention, class_names=tuple(categories.values()))
    other, resized = other_meaning(detector, given, settings.attention), _changed(before, weights)
    if why := other_classes(given, class_names):
        other |= {name: why for name in detector.state_dict() if name.startswith(BY_CLASS)}
    return transplant(detector, weights, str(folder), other=other, resized=resized)


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The names of what isn't as before."""
    return {name for name, new in after.items() if not torch.equal(before[name], new)}


@torch.no_grad()
def _carry(trunk: Trunk, side: int) -> None:
    """Bring a trunk's weights to a grid of another side: position embeddings, operators, tables of positions."""
    old = trunk.img_size // trunk.stride
    if old == side:
        return
    for index in trunk.global_blocks:
        attn = trunk.vit.blocks[index].attn
        if "operator" in attn._modules:
            resample_operator(attn.operator, (old, old), (side, side))
        for name in ("rel_pos_h", "rel_pos_w"):
            table = getattr(attn, name)
            if table is not None:
                longer = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
                setattr(attn, name, nn.Parameter(longer.contiguous()))
    resize_embeddings(trunk.vit, side * trunk.stride)


def load_trunk(detector: Detector, settings: DetectSettings) -> list[Transplanted]:
    """Give the trunk the weights that `settings.init` names, as far as they fit; what became of each part.

    The source loses its class token and is carried to the window's grid (operators 197 -> 196 tokens), then to the
    detector's: position embeddings and the operators of global blocks are resampled (SPEC §9). Where the source is
    softmax, the operators start fresh.

    Raises ValueError for a source that is no plain ViT, and as `karat.train.init` does.
    """
    assert settings.init is not None
    source: Any
    given = read_source(settings, detector.trunk.vit.state_dict())
    source, theirs = _source(given, settings)
    _check_trunk(source, settings.init)
    other = other_meaning(detector.trunk.vit, given, settings.attention)  # before the source is changed
    patch: int = source.patch_embed.patch_size[0]
    resample_tokens(source, img_size=settings.window * patch, num_prefix_tokens=0)
    grid = settings.recipe.img_size // detector.trunk.stride
    with torch.random.fork_rng(devices=[]):
        trunk = to_grid(source, grid * patch, settings.window, settings.global_blocks, settings.recipe.rel_pos)
    weights = {name: tensor for name, tensor in trunk.vit.state_dict().items() if name in theirs}
    resized = _changed(theirs, weights)
    fates = transplant(detector.trunk.vit, weights, settings.init, other=other, resized=resized)
    fates = assumed(fates, given, settings.attention)
    others: dict[str, nn.Module] = {"pyramid": detector.backbone.levels, "rpn": detector.rpn}
    others["heads"] = detector.roi_heads
    for name, module in others.items():
        own = list(module.parameters())
        fates.append(Transplanted(name, FRESH, len(own), sum(p.numel() for p in own)))
    return fates


def _check_trunk(source: nn.Module, name: str) -> None:
    """ValueError for a model whose blocks don't compute an attention of their own over a grid of tokens."""
    why = f"a {type(source).__name__} is no plain ViT"
    backbone = backbone_of(source)
    if backbone is not None and backbone.plain:
        blocks: Any = source.blocks
        attentions = [getattr(block, "attn", block) for block in blocks]
        other = sorted(type(attn).__name__ for attn in attentions if not _serves(kind_of(attn)))
        if not other:
            return
        why = f"its blocks have {other[0]}"
    raise ValueError(
        f"--init {name}: it can't be a detector's trunk ({why}); give a ViT with softmax or karat's attention"
    )


def _serves(kind: AttentionKind | None) -> bool:
    """Whether `GridAttention` can take an attention over: softmax that could be converted, or converted."""
    return kind is not None and (kind.learned or kind.adapter is not None)


def _source(given: Given, settings: DetectSettings) -> tuple[nn.Module, dict[str, Tensor]]:
    """The source as a classifier, and the weights it came with."""
    if given.model is not None:
        return given.model, {key: tensor.clone() for key, tensor in given.weights.items()}
    sizes: dict[str, Any] = settings.model_kwargs()
    source: Any = create_model(settings.model, settings.attention, **sizes)
    refuse_other_form(source, given.weights)
    places = places_of_weights(given.weights)
    if places is not None:  # on its own grid, from where position embeddings and operators are carried together
        sizes["img_size"] = places.grid.height * source.patch_embed.patch_size[0]
        sizes |= {} if places.grid.prefix else {"class_token": False, "global_pool": "avg"}
        source = create_model(settings.model, settings.attention, **sizes)
    weights = with_factors(source, given.weights)
    fitting, _ = fit(source, weights)
    if not fitting:
        raise ValueError(f"--init {given.name}: it shares no weight with {settings.model}")
    source.load_state_dict(source.state_dict() | without_torn_layers(source, fitting, weights))
    return source, {key: weights[key] for key in fitting}
