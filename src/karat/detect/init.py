"""A detector from other weights (`--init`): its trunk from a classifier, or all of it from a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from karat.detect.detector import Detector
from karat.detect.measure import load_run
from karat.detect.settings import DetectSettings
from karat.detect.trunk import Trunk, resize_embeddings, to_grid
from karat.models import create_model
from karat.resample import resample_tokens
from karat.token_grid import resample_operator
from karat.train import files, runs
from karat.train.init import FRESH, Fate, read_model, same_operators, transplant


def load_init(detector: Detector, settings: DetectSettings) -> list[Fate]:
    """Give the detector the weights that `settings.init` names, as far as they fit; what became of each part.

    A detector's run gives everything, the heads where the classes are as many; anything else gives the trunk.
    Raises ValueError as `karat.train.init` does.
    """
    assert settings.init is not None
    folder = Path(settings.init).expanduser()
    if runs.is_run(folder) and runs.task_of(folder) == DetectSettings.task:
        return _load_detector(detector, settings, folder)
    return load_trunk(detector, settings)


def _load_detector(detector: Detector, settings: DetectSettings, folder: Path) -> list[Fate]:
    source, theirs, _ = load_run(folder)
    _carry(source.trunk, settings.recipe.img_size // detector.trunk.stride)
    same = same_operators(settings.attention, theirs.attention)
    return transplant(detector, source.state_dict(), str(folder), same_operator=same)


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
