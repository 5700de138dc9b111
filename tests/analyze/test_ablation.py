"""Models with parts of their learned attention taken away, where what is left is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karat import karat_operators
from karat.analyze.ablation import KEPT, AblationOutcome, ablate
from support.small_models import images, small_model

COMMON, ROW = "what all images have in common", "one row"


def outcome(model: nn.Module, pixels: Tensor, labels: Tensor) -> AblationOutcome:
    with torch.no_grad():
        logits = model.eval()(pixels)
    top1 = 100 * float((logits.argmax(1) == labels).float().mean())
    return AblationOutcome(top1, float(F.cross_entropy(logits, labels)))


def outspoken(attention: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = small_model("vit", attention)
    for op in karat_operators(model).values():
        if op.gate is not None:
            nn.init.constant_(op.gate, 0.7)
    for block in model.blocks:  # timm's start hardly sees the image
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return model, images("vit", 150), torch.randint(0, 4, (150,))


def same(found: AblationOutcome, expected: AblationOutcome) -> bool:
    return found.top1 == pytest.approx(expected.top1, abs=1e-3) and found.loss == pytest.approx(expected.loss, abs=1e-5)


@pytest.mark.parametrize(
    "attention", ["g2b", "g2b,residual=softmax", "g2u,residual=softmax,softmax_heads=1", "g2b,softmax_heads=2"]
)
def test_all_of_it_is_the_model_and_each_part_is_another(attention: str) -> None:
    model, pixels, labels = outspoken(attention)
    expected = outcome(model, pixels, labels)
    found = ablate(model.train(), pixels, labels)
    assert model.training
    assert same(found["all"], expected)
    assert len({round(one.loss, 6) for one in found.values()}) == len(KEPT)
    assert same(outcome(model, pixels, labels), expected)  # nothing was left behind


@pytest.mark.parametrize(("attention", "whole"), [("static-b,rank=3", COMMON), ("row-b,rank=None", ROW)])
def test_what_is_blind_to_the_scores_loses_nothing_by_its_mean(attention: str, whole: str) -> None:
    model, pixels, labels = outspoken(f"{attention},residual=softmax")
    found = ablate(model, pixels, labels)
    assert same(found[whole], found["all"])
    assert same(found["what follows the image"], found["nothing"])
    assert not same(found["nothing"], found["all"])
    if whole == COMMON:
        assert not same(found[ROW], found["all"])


def test_without_its_learned_part_a_residual_model_is_the_softmax_model() -> None:
    model, pixels, labels = outspoken("g2b,residual=softmax")
    softmax = small_model("vit")
    softmax.load_state_dict({name: x for name, x in model.state_dict().items() if "operator" not in name})
    assert same(ablate(model, pixels, labels)["nothing"], outcome(softmax, pixels, labels))


@pytest.mark.parametrize(
    ("name", "attention", "message"), [("vit", "softmax", "nothing to take away"), ("swin", "g2b", "windows")]
)
def test_models_without_such_parts(name: str, attention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(small_model(name, attention), images(name), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(("count", "labelled"), [(1, 1), (5, 4), (0, 0)])
def test_means_over_images_want_two_with_a_label_each(count: int, labelled: int) -> None:
    with pytest.raises(ValueError, match=f"{count} images with {labelled} labels"):
        ablate(small_model("vit", "g2b"), images("vit", 5)[:count], torch.zeros(labelled, dtype=torch.long))
