"""One row of each table that trains: its model at full size takes two steps on stand-in images."""

import numpy as np
import pytest
import torch
from PIL import Image

from karat.detect.detector import build_detector
from karat.detect.settings import DetectSettings
from karat.detect.task import total_loss
from karat.models.create import create_model
from karat.models.transfer import transfer_attention
from karat.paper import rows, run_row
from karat.paper.setup import MODELS
from karat.runs.recipes import RECIPES
from karat.train.classify import create_loss, create_mixup
from karat.train.classify import mix as mix_batch
from karat.train.optim import create_optimizer


def chosen():
    """For each table the smallest model's last row; every family where there are several."""
    picked, sizes = {}, list(MODELS)  # small ones first
    for entry in rows():
        trains = entry.setup.kind in ("train", "finetune") or entry.table == 13  # which counts costs alone
        if trains and (entry.setup.attention != "softmax" or entry.table == 14):
            family = entry.model if entry.table == 3 else ""
            key = entry.table, family
            best = picked.get(key)
            if best is None or sizes.index(entry.model) <= sizes.index(best.model):
                picked[key] = entry
    return list(picked.values())


@pytest.mark.slow
@pytest.mark.parametrize("entry", chosen(), ids=lambda e: f"table{e.table}-{e.model}-{e.variant}")
def test_two_steps_at_full_size(entry):
    setup = entry.setup
    recipe = RECIPES[setup.recipe or "vit"].override(batch_size=2)
    shape = {"mnist": (1, 28), "fashion_mnist": (1, 28)}.get(entry.dataset, (3, 32 if entry.table == 14 else 224))
    sizes = {"in_chans": shape[0], "img_size": shape[1]} if entry.table == 14 else {}
    model = create_model(setup.model, attention=setup.attention, num_classes=setup.num_classes, **sizes)
    optimizer = create_optimizer(model, recipe, total_batch=setup.batch_size or 32)
    mixup, loss = create_mixup(recipe, setup.num_classes), create_loss(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        images, targets = mix_batch(mixup, torch.randn(2, shape[0], shape[1], shape[1]), torch.tensor([1, 7]))
        value = loss(model(images), targets)
        assert value.isfinite()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    for part in ("coefficients",) if entry.table == 14 else ("operator", "qkv"):
        assert any(part in name for name in moved)


@pytest.mark.slow
def test_two_steps_of_the_published_detector():
    entry = next(e for e in rows(12) if e.variant.startswith("g1u"))
    options = {name[2:].replace("-", "_"): value for name, value in entry.setup.options().items()}
    wanted = {name: options[name] for name in ("model", "attention", "data", "recipe")}
    settings = DetectSettings.make(**wanted, epochs=int(options["epochs"]))
    model = build_detector(settings, entry.setup.num_classes).train()
    optimizer = create_optimizer(model, settings.recipe, total_batch=entry.setup.batch_size)
    side = settings.recipe.img_size
    mask = torch.zeros(1, side, side, dtype=torch.uint8)
    mask[:, 30:150, 40:160] = 1
    target = {"boxes": torch.tensor([[40.0, 30.0, 160.0, 150.0]]), "labels": torch.tensor([3]), "masks": mask}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "operator" in name}
    for _ in range(2):
        value = total_loss(model, ([torch.rand(3, side, side)], [target]))
        assert value.isfinite()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.slow
def test_two_steps_of_the_base_model_on_the_attention_of_the_tiny_one():
    entry = next(e for e in rows(4) if (e.model, e.variant) == ("vit_base", "softmax<-vit_tiny+g3b"))
    setup = entry.setup
    recipe = RECIPES[setup.recipe].override(batch_size=2)
    teacher = create_model(setup.teacher_model, attention=setup.teacher_attention, num_classes=setup.num_classes)
    student = create_model(setup.model, attention=setup.attention, num_classes=setup.num_classes)
    images = torch.randn(2, 3, 224, 224)
    student = transfer_attention(student, teacher, images[:1]).train()
    optimizer = create_optimizer(student, recipe, total_batch=setup.batch_size)
    for step in range(2):
        value = create_loss(recipe)(student(images), torch.eye(10)[[1, 7]])
        value.backward()
        assert value.isfinite()
        assert all(p.grad is not None for p in student.parameters()), step
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_grad, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_run_row_from_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    extra = {
        "--data": str(tmp_path / "images"),
        "--batch-size": "4",
        "--output": str(tmp_path / "run"),
        "--device": "cpu",
    }
    entry = next(e for e in rows(1) if (e.model, e.variant, e.dataset) == ("vit_tiny", "g3u", "cifar10"))
    measured = run_row(entry, 0.5, extra | {"--epochs": "1"})
    assert set(measured) == {"top1", "top5"}
    assert 0 <= measured["top1"] <= measured["top5"] <= 100
