"""What works for a ViT works for attached models: creation by name, other sizes, saved models, transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import karat
from karat.models.attach.example import described, from_description
from karat.models.attach.resize import _grid
from support.attached import HIERA, LEVIT, PLAIN, SWIN, TWINS

PYRAMID: dict[str, Any] = {"img_size": 64, "num_classes": 3, "depths": (1, 1, 1, 1)}
ROTARY: dict[str, Any] = {"img_size": 56, "num_classes": 3, "depth": 2, "embed_dim": 24, "num_heads": 3}


def keys(model: torch.nn.Module) -> list[int]:
    return [op.num_tokens for op in karat.karat_operators(model).values()]


def test_a_model_of_any_image_size_takes_the_one_that_is_named() -> None:
    model = karat.create_model("pvt_v2_b0", "g3b", **PYRAMID)
    assert keys(model) == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="img_size"):
        karat.create_model("pvt_v2_b0", img_size=64)


@pytest.mark.parametrize(
    ("name", "arguments", "size", "expected"),
    [
        ("pvt_v2_b0", PYRAMID, (96, 64), [6, 6, 6, 6]),
        ("eva02_tiny_patch14_224", ROTARY, (84, 84), [37, 37]),
    ],
)
def test_another_image_size(name: str, arguments: dict[str, Any], size: tuple[int, int], expected: list[int]) -> None:
    model = karat.create_model(name, "g3b", **arguments).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    karat.resample_tokens(model, img_size=arguments["img_size"])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    karat.resample_tokens(model, img_size=size)
    assert keys(model) == expected
    assert torch.isfinite(model(torch.randn(2, 3, *size))).all()
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=arguments["img_size"])
        assert keys(model) == [17, 17]


def test_grids_have_the_proportions_of_the_image() -> None:
    assert _grid(96, (64, 96)) == (8, 12)
    assert _grid(49, (224, 224)) == (7, 7)
    assert _grid(50, (224, 224)) is None
    assert _grid(0, (224, 224)) is None


def test_a_size_that_cannot_be_had_leaves_the_model_as_it_was() -> None:
    model = karat.create_model("eva02_tiny_patch14_224", "g3b", **ROTARY)
    with pytest.raises(ValueError, match="num_prefix_tokens"):
        karat.resample_tokens(model, num_prefix_tokens=0)
    with pytest.raises(ValueError, match="can't have images"):
        karat.resample_tokens(model, img_size=5)
    assert keys(model) == [17, 17]


@pytest.mark.parametrize(
    ("name", "side", "arguments"),
    [
        ("pvt_v2_b0", 64, PYRAMID),
        ("eva02_tiny_patch14_224", 56, ROTARY),
        ("swinv2_tiny_window8_256", 32, SWIN),
        ("twins_svt_small", 32, TWINS | {"sr_ratios": (2,)}),  # these don't keep the size that they are given
        ("hiera_tiny_224", 32, HIERA),
        ("levit_128s", 32, LEVIT),
        ("naflexvit_base_patch16_gap", 32, PLAIN),
    ],
)
def test_a_saved_model_is_built_and_attached_again(
    name: str, side: int, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = karat.KArAtModel.create(name, "g3b", **arguments).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, side, side)
    assert torch.equal(karat.from_pretrained(tmp_path)(x), model(x))


def test_an_example_is_described_by_shapes_and_kinds() -> None:
    example = {"input_ids": torch.ones(2, 7, dtype=torch.long), "mask": torch.ones(2, 7, dtype=torch.bool)}
    again = from_description(described(example))
    assert isinstance(again, dict)
    assert {name: (x.shape, x.dtype) for name, x in again.items()} == {
        name: (x.shape, x.dtype) for name, x in example.items()
    }
    assert described((torch.zeros(2), 3)) is None
    with pytest.raises(ValueError, match="no example"):
        from_description([[[2], "load"]])


def test_a_text_encoder_of_transformers_is_saved_and_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from karat.share.transformers import from_pretrained

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99, max_position_embeddings=32)).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": torch.randint(0, 99, (2, 12)), "attention_mask": mask}
    karat.karatize(model, "g3b", example=inputs)
    assert keys(model) == [12, 12]
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
        padded = inputs | {"input_ids": inputs["input_ids"].masked_fill(mask == 0, 5)}
        torch.testing.assert_close(model(**padded).last_hidden_state[1, :7], out[1, :7])
        model.save_pretrained(tmp_path)
        assert torch.equal(from_pretrained(transformers.BertModel, tmp_path).eval()(**inputs).last_hidden_state, out)


def test_a_vision_model_of_transformers_needs_no_example() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.Dinov2Config(**sizes, image_size=32, patch_size=8)
    model = karat.karatize(transformers.Dinov2Model(config), "g3b")
    assert keys(model) == [17, 17]
