"""The heads: torchvision's own as the paper has them, detectron2's as ViTDet has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from karat.detect.detector import Detector, build_detector
from karat.detect.recipes import RECIPES
from karat.detect.settings import DetectSettings
from support.detection import TINY, tiny

SMALL: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 4, "num_heads": 2, "channels": 8, "head_width": 16}


def small(recipe: str, **values: Any) -> Detector:
    return build_detector(DetectSettings.make(model=TINY["model"], recipe=recipe, **SMALL, **values), 2)


def kinds(module: nn.Module, *types: type[nn.Module]) -> list[int]:
    """How many of each type there are within."""
    return [sum(isinstance(inner, kind) for inner in module.modules()) for kind in types]


def test_vitdets_recipe_has_vitdets_heads_and_relative_positions() -> None:
    """detectron2, projects/ViTDet/configs: conv_dims [-1, -1], 4conv1fc, "LN", use_rel_pos with windows of 14."""
    detector = small("jitter")
    layers = nn.Conv2d, LayerNorm2d, nn.Linear
    heads = detector.roi_heads
    assert kinds(detector.rpn.head.conv, *layers) == [2, 0, 0]
    assert kinds(heads.box_head, *layers) == [4, 4, 1]
    assert kinds(heads.mask_head, *layers) == [4, 4, 0]
    assert detector.img_size == 1024
    tables = [len(block.attn.rel_pos_h) for block in detector.trunk.vit.blocks]
    assert detector.trunk.global_blocks == {0, 1, 2, 3}
    assert tables == [2 * 64 - 1] * 4
    tables = [len(block.attn.rel_pos_w) for block in small("jitter", global_blocks=(1, 3)).trunk.vit.blocks]
    assert tables == [2 * 14 - 1, 2 * 64 - 1] * 2


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "jitter"])
def test_the_other_recipes_have_torchvisions(recipe: str) -> None:
    detector = small(recipe)
    assert isinstance(detector.roi_heads.box_head, TwoMLPHead)
    assert kinds(detector.rpn.head.conv, nn.Conv2d) == [1]
    assert kinds(detector.roi_heads, LayerNorm2d) == [0]
    assert not any(".rel_pos_" in name for name, _ in detector.named_parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "rpn_convs": {"rpn_convs": 2},
    "box_convs": {"box_convs": 3},
    "head_norm": {"head_norm": True},
    "all": {"rpn_convs": 2, "box_convs": 4, "head_norm": True, "rel_pos": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_part_learns(name: str) -> None:
    detector = build_detector(tiny(Path("x"), **OPTIONS[name]), 2)
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 8:40, 8:40] = 1
    target: dict[str, Tensor] = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1]), "masks": masks}
    losses = detector([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    for part in (detector.rpn, detector.roi_heads.box_head, detector.roi_heads.mask_head):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


@pytest.mark.parametrize(("name", "value"), [("box_convs", -1), ("rpn_convs", 0)])
def test_counts_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tiny(Path("x"), **{name: value})


@pytest.mark.parametrize("relative", [True, False])
def test_settings_from_before_the_options_mean_what_they_did(relative: bool) -> None:
    """rel_pos stood beside the recipe, and heads were torchvision's whatever the recipe."""
    plain = tiny(Path("x"), recipe="jitter", rel_pos=relative).as_dict()
    for name in ("rel_pos", "rpn_convs", "box_convs", "head_norm"):
        del plain["recipe"][name]
    found = DetectSettings.from_dict({**plain, "rel_pos": relative}).recipe
    assert (found.rel_pos, found.rpn_convs, found.box_convs, found.head_norm) == (relative, 1, 0, False)
