"""What is drawn of detections: masks laid over each other, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from karat.detect.draw import OPACITY, DrawnObject, draw, found_objects
from karat.plots import COLOURS

GREY = Image.new("RGB", (64, 48), (100, 100, 100))


def drawn(*objects: DrawnObject) -> np.ndarray:
    return np.asarray(draw(GREY, objects), dtype=float)


def test_masks_blend_in_turn() -> None:
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[20:30, 20:40] = True
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 0.0, 60.0, 10.0]])
    pixels = drawn(*(DrawnObject(label, box, mask, "cat") for label, box in enumerate(boxes, start=1)))
    expected = np.full(3, 100.0)
    for colour in COLOURS[:2]:
        expected = (1 - OPACITY) * expected + OPACITY * np.array(ImageColor.getrgb(colour))
    assert np.abs(pixels[25, 30] - expected).max() < 2  # rounded twice
    assert (pixels[40, 50] == 100).all()


def test_what_scores_less_is_left_out_and_the_surest_lies_on_top() -> None:
    output = {"labels": torch.tensor([2, 1, 1]), "scores": torch.tensor([0.9, 0.6, 0.1])}
    output |= {"masks": torch.zeros(3, 1, 48, 64), "boxes": torch.zeros(3, 4)}
    assert [one.words for one in found_objects(output, ["cat", "dog"], 0.5)] == ["cat 0.60", "dog 0.90"]
    assert (drawn() == 100).all()


@pytest.mark.parametrize("name", ["猫", "قطة", "बिल्ली", "😺", "bad\udcff", "tab\there", "\x07"])
def test_names_in_any_script_are_drawn_or_spelt(name: str) -> None:
    """The box that a font draws for what it lacks is the same for every name that it lacks."""
    one, other = (
        drawn(DrawnObject(1, torch.tensor([2.0, 20.0, 60.0, 40.0]), torch.zeros(48, 64, dtype=torch.bool), words))
        for words in (name, "\ue000")
    )
    assert (one != other).any()
