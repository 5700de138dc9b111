"""Models of transformers with operators attached by `karatize`: saved, loaded, trained by transformers' own Trainer."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import karat
from karat.models.attach.mode import attached

transformers = pytest.importorskip("transformers", reason="an optional extra: pip install 'karat[transformers]'")

from karat.share.transformers import from_pretrained, karatize_hf  # noqa: E402

TEXT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 4}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class -> its configuration's class, settings
    "ViTModel": ("ViTConfig", IMAGE),
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "DeiTModel": ("DeiTConfig", IMAGE),
    "Dinov2Model": ("Dinov2Config", IMAGE),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**IMAGE, "hidden_size": 48}),
    "BeitModel": ("BeitConfig", {**IMAGE, "use_relative_position_bias": True}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE),
    "SiglipVisionModel": ("SiglipVisionConfig", IMAGE),
    "ViTMAEModel": ("ViTMAEConfig", IMAGE),
    "SwinModel": ("SwinConfig", WINDOWS),
    "BertModel": ("BertConfig", {**TEXT, "vocab_size": 99, "max_position_embeddings": 32}),
}


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model of random weights, its operators' too, and an input."""
    torch.manual_seed(0)
    config, settings = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    if config == "BertConfig":
        return model, {"input_ids": torch.randint(0, 99, (2, 12))}
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)  # a masked autoencoder's mask
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_its_own_save_pretrained_wrote_is_the_same_again(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    karat.karatize(model, "g3b", example=inputs)
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(answer(again, inputs), answer(model, inputs))


@pytest.mark.parametrize("way", [karatize_hf, karat.karatize])
def test_a_shared_operator_is_renamed_and_named_back(way: Any, tmp_path: Path) -> None:
    model, inputs = made("ViTModel")
    way(model, "g3u,residual=softmax")
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(from_pretrained(type(model), tmp_path).eval(), inputs), answer(model, inputs))


def test_padding_is_no_part_of_a_text(tmp_path: Path) -> None:
    model, inputs = made("BertModel")
    karat.karatize(model, "g3b", example=inputs)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    other = inputs["input_ids"].where(mask == 1, 5)
    expected = answer(model, inputs | {"attention_mask": mask})
    got = answer(model, {"input_ids": other, "attention_mask": mask})
    torch.testing.assert_close(got[1, :7], expected[1, :7])
    assert not torch.equal(answer(model, {"input_ids": other})[1, :7], expected[1, :7])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:'pin_memory'")
def test_their_trainer_trains_saves_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, _ = made("ViTForImageClassification")
    karat.karatize(model, "g3b")
    before = {name: p.clone() for name, p in model.named_parameters()}
    digits = [{"pixel_values": torch.full((3, 16, 16), float(i % 2)), "labels": i % 2} for i in range(8)]

    def train(steps: int, resume: bool) -> list[float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=digits)
        with contextlib.redirect_stdout(None):
            trainer.train(resume_from_checkpoint=resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    losses = train(4, resume=False)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "operator" in name} <= moved
    assert len(train(6, resume=True)) == 6
    again = from_pretrained(transformers.ViTForImageClassification, tmp_path / "run" / "checkpoint-6").eval()
    pixels = torch.stack([one["pixel_values"] for one in digits])
    assert torch.equal(answer(again, {"pixel_values": pixels}), answer(model.eval(), {"pixel_values": pixels}))
    assert all(attached(layer.attention) is not None for layer in again.vit.layers)
