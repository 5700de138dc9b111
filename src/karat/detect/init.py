"""A detector's trunk from a classifier's weights (`--init`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat.detect.detector import Detector
from karat.detect.settings import DetectSettings
from karat.detect.trunk import to_grid
from karat.models import create_model
from karat.resample import resample_tokens
from karat.train import files
from karat.train.init import FRESH, Fate, read_model, transplant


def load_trunk(detector: Detector, settings: DetectSettings) -> list[Fate]:
    """Give the trunk the weights that `settings.init` names, as far as they fit; what became of each part.

    The source loses its class token and is carried to the window's grid (operators 197 -> 196 tokens), then to the
    detector's: position embeddings and the operators of global blocks are resampled (SPEC §9). Where the source is
    softmax, the operators start fresh. Raises ValueError as `karat.train.init` does.
    """
    assert settings.init is not None
    source: Any
    source, absent, same = _source(settings.init, settings)
    patch: int = source.patch_embed.patch_size[0]
    resample_tokens(source, img_size=settings.window * patch, num_prefix_tokens=0)
    grid = settings.recipe.img_size // detector.trunk.stride
    with torch.random.fork_rng(devices=[]):
        trunk = to_grid(source, grid * patch, settings.window, settings.global_blocks, settings.rel_pos)
    weights = {
        name: tensor
        for name, tensor in trunk.vit.state_dict().items()
        if name not in absent and ".rel_pos_" not in name  # of a classifier they are new, zeros
    }
    fates = transplant(detector.trunk.vit, weights, settings.init, same_operator=same)
    others: dict[str, nn.Module] = {"pyramid": detector.backbone.levels, "rpn": detector.rpn}
    others["heads"] = detector.roi_heads
    for name, module in others.items():
        own = list(module.parameters())
        fates.append(Fate(name, FRESH, len(own), sum(p.numel() for p in own)))
    return fates


def _source(name: str, settings: DetectSettings) -> tuple[nn.Module, set[str], bool]:
    """The source as a classifier, the names of weights that it lacks, and whether its operators mean the same."""
    whole = read_model(name, settings)
    if whole is not None:
        return whole[0], set(), whole[1]
    weights = files.read_tensors(Path(name).expanduser())
    source = create_model(settings.model, settings.attention, **settings.model_kwargs())
    own = source.state_dict()
    fitting = {key: tensor for key, tensor in weights.items() if key in own and tensor.shape == own[key].shape}
    if not fitting:
        raise ValueError(f"--init {name}: it shares no weight with {settings.model}")
    source.load_state_dict(own | fitting)
    return source, set(own) - set(fitting), True
