"""Scripts written for earlier versions go on: what their pages imported is what the rooms have now."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from karat.old_paths import PATHS

HANDED_ON = {
    "karat.attention": ("karat.models.attention", "KArAtAttention"),
    "karat.convert": ("karat.models.karatize", "karatize"),
    "karat.distill": ("karat.models.distill", "fit_operators", "measure_blocks", "distill"),
    "karat.export": ("karat.share.export", "export_onnx", "export_pt2", "exported_program", "plain_path"),
    "karat.grids": ("karat.operator.grids", "on_grid"),
    "karat.hub": ("karat.share.hub", "KArAtModel", "ModelConfig", "from_pretrained"),
    "karat.hub.config": ("karat.runs.saved", "ModelConfig"),
    "karat.hub.runs": ("karat.share.hub.runs", "from_run", "open_model"),
    "karat.kan": ("karat.models.kan", "SplineLinear", "GroupRational", "FourierLinear", "RBFLinear", "KANClassifier"),
    "karat.train.data": ("karat.data.splits", "Data", "open_splits"),
    "karat.train.data_augment": ("karat.data.images", "Fit", "Normalise", "statistics"),
    "karat.train.engine": ("karat.train.classify", "train"),
    "karat.train.recipes": ("karat.runs.recipes", "RECIPES", "Recipe", "get_recipe"),
    "karat.train.run_model": ("karat.runs.model", "load_run", "build_model"),
    "karat.train.settings": ("karat.runs.classification", "Settings"),
}


@pytest.mark.parametrize("old", HANDED_ON)
def test_an_old_path_gives_what_the_room_has(old: str) -> None:
    new, *names = HANDED_ON[old]
    for name in names:
        assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)
    with pytest.raises(ImportError, match="no_such"):
        exec(f"from {old} import no_such")


def test_every_old_path_is_tried() -> None:
    assert {*PATHS, "karat.train.engine"} == set(HANDED_ON)


def test_data_is_loaded_as_it_was() -> None:
    from karat.train.data import load_data
    from karat.train.data_augment import decode
    from karat.train.recipes import RECIPES

    data = load_data("digits", recipe=RECIPES["quick"], img_size=16, fraction=0.1, seed=3)
    images, labels = next(iter(data.train))
    assert images.shape[1:] == (1, 16, 16)
    assert len(labels) == RECIPES["quick"].batch_size
    assert load_data("digits", recipe=RECIPES["quick"], batch_size=4).train.batch_size == 4
    assert decode(np.zeros((4, 6), np.uint8), 3).size == (6, 4)
    with pytest.raises(TypeError, match="no_such"):
        load_data("digits", recipe=RECIPES["quick"], no_such=1)
