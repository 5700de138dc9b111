"""A detector from other weights (`--init`): its trunk from a classifier, or all of it from a detector."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
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
from karat.models.kan.mlp import refuse_other_form
from karat.models.resample import resample_tokens
from karat.operator.operator import with_factors, without_torn_layers
from karat.operator.token_grid import resample_operator
from karat.runs import files
from karat.train.init import FRESH, Transplanted, adapt, read_model, same_operators, transplant


def load_init(detector: Detector, settings: DetectSettings) -> list[Transplanted]:
    """Give the detector the weights that `settings.init` names, as far as they fit; what became of each part.

    A detector's run gives everything, the heads where the classes are as many; anything else gives the trunk.
    Raises ValueError as `karat.train.init` does.
    """
    assert settings.init is not None
    folder = Path(settings.init).expanduser()
    if runs.is_run(folder) and runs.task_of(folder) == DetectSettings.task:
        return _load_detector(detector, settings, folder)
    return load_trunk(detector, settings)


def _load_detector(detector: Detector, settings: DetectSettings, folder: Path) -> list[Transplanted]:
    source, theirs, _ = load_run(folder)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    _carry(source.trunk, settings.recipe.img_size // detector.trunk.stride)
    same, weights = same_operators(settings.attention, theirs.attention), source.state_dict()
    resized = _changed(before, weights)
    return transplant(detector, weights, str(folder), same_operator=same, resized=resized)


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
    source, theirs, same = _source(settings.init, settings)
    _check_trunk(source, settings.init)
    patch: int = source.patch_embed.patch_size[0]
    resample_tokens(source, img_size=settings.window * patch, num_prefix_tokens=0)
    grid = settings.recipe.img_size // detector.trunk.stride
    with torch.random.fork_rng(devices=[]):
        trunk = to_grid(source, grid * patch, settings.window, settings.global_blocks, settings.recipe.rel_pos)
    weights = {name: tensor for name, tensor in trunk.vit.state_dict().items() if name in theirs}
    resized = _changed(theirs, weights)
    fates = transplant(detector.trunk.vit, weights, settings.init, same_operator=same, resized=resized)
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


def _source(name: str, settings: DetectSettings) -> tuple[nn.Module, dict[str, Tensor], bool]:
    """The source as a classifier, the weights it came with, and whether its operators mean the same."""
    whole = read_model(name, settings)
    if whole is not None:
        return whole[0], {key: tensor.clone() for key, tensor in whole[0].state_dict().items()}, whole[1]
    weights = files.read_tensors(Path(name).expanduser())
    source: Any = create_model(settings.model, settings.attention, **settings.model_kwargs())
    refuse_other_form(source, weights)
    grid = _grid_of(weights)
    if grid is not None:  # on its own grid, from where position embeddings and operators are carried together
        side, prefix = grid
        kwargs: dict[str, Any] = {} if prefix else {"class_token": False, "global_pool": "avg"}
        img_size = side * source.patch_embed.patch_size[0]
        source = create_model(
            settings.model, settings.attention, img_size=img_size, **kwargs, **settings.model_kwargs()
        )
    own, weights = source.state_dict(), with_factors(source, weights)
    adapted = {key: adapt(key, weights[key], own[key], source) for key in own if key in weights}
    fitting = {key: tensor for key, tensor in adapted.items() if tensor is not None}
    if not fitting:
        raise ValueError(f"--init {name}: it shares no weight with {settings.model}")
    source.load_state_dict(own | without_torn_layers(source, fitting, weights))
    return source, {key: weights[key] for key in fitting}, True


def _grid_of(weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Side of the token grid and number of prefix tokens of a ViT's weights; None where they don't say it."""
    embedding, prefix = weights.get("pos_embed"), int("cls_token" in weights)
    if embedding is None or embedding.ndim != 3:
        return None
    side = isqrt(max(embedding.shape[1] - prefix, 0))
    return (side, prefix) if side and side**2 == embedding.shape[1] - prefix else None
