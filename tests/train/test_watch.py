"""The watch over what drives the gradient: bursts of the operators' making, and clipping by their own norm."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from karat import KArAtOperator, runs
from karat.runs import checkpoint, files
from karat.train import step, watch
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from karat.train.optim import operator_parameters
from support.interrupted import CutOff, Doomed
from support.training import outcome, tiny


def norm_of(gradients: list[Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()


def gradients(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """Of the operators, and of the rest."""
    model = trainer.parts.bare
    own = {id(p) for p in operator_parameters(model).values()}
    pairs = [(id(p) in own, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    return [g for mine, g in pairs if mine], [g for mine, g in pairs if not mine]


def blow_up(model: nn.Module, factor: float, *, operators: bool = True) -> list[torch.utils.hooks.RemovableHandle]:
    """Multiply the gradients of the operators, or of the rest, by a factor from now on."""
    own = {id(p) for p in operator_parameters(model).values()}
    chosen = [p for p in model.parameters() if p.requires_grad and (id(p) in own) == operators]
    return [p.register_hook(lambda g: g * factor) for p in chosen]


def one_update(folder: Path, *, past: int, factor: float, operators: bool = True, **values: object) -> tuple:
    """An update whose gradients are blown up, after `past` updates of usual norm; the trainer, before and after.

    Before: the gradients as they are unclipped.
    """
    made = []
    for clip in (None, values.pop("clip_grad", 1.0)):
        # at a rate of 0 the first update changes nothing
        trainer = Trainer(
            Classification(), tiny(folder / str(clip), attention="g3b", clip_grad=clip, warmup_lr=0.0, **values)
        )
        batch = [next(iter(trainer.data.train))]
        usual = step.update(trainer.parts, 0, batch).norm
        trainer.parts.watch.norms.clear()
        trainer.parts.watch.norms.extend([usual] * past)
        blow_up(trainer.parts.bare, factor, operators=operators)
        done = step.update(trainer.parts, 1, batch)
        made.append((trainer, done, *gradients(trainer)))
    return tuple(made)


def test_in_a_burst_operators_and_rest_are_clipped_apart(tmp_path: Path) -> None:
    (_, loose, own, rest), (trainer, done, own_after, rest_after) = one_update(
        tmp_path, past=watch.LEAST, factor=1e5, clip_grad=0.05
    )
    assert done.operator_norm == pytest.approx(norm_of(own), rel=1e-5)
    assert done.norm == pytest.approx(math.hypot(norm_of(own), norm_of(rest)), rel=1e-5)
    assert norm_of(rest) > 0.05
    assert norm_of(own_after) == pytest.approx(0.05, rel=1e-4)
    assert norm_of(rest_after) == pytest.approx(0.05, rel=1e-4)
    for parts in ((own, own_after), (rest, rest_after)):  # shorter, and no other
        for before, after in zip(*parts, strict=True):
            torch.testing.assert_close(after, before * (0.05 / norm_of(parts[0])), rtol=1e-4, atol=1e-9)
    assert trainer.parts.watch.norms[-1] == done.norm
    for each in (loose, done):
        assert each.note is not None
        assert "step 1: the operators drive the gradient's norm to" in each.note
        assert "--operator-lr-scale 0.3" in each.note
    assert "clipped by their own norm" in str(done.note)
    assert "not clipped (--clip-grad None)" in str(loose.note)


@pytest.mark.parametrize(
    ("past", "factor", "operators"),
    [(watch.LEAST - 1, 1e5, True), (watch.LEAST, 1.0, True), (watch.WINDOW, 1e5, False)],
    ids=["no median yet", "no burst", "of the rest's making"],
)
def test_otherwise_all_are_clipped_together_to_the_same_bits(
    tmp_path: Path, past: int, factor: float, operators: bool
) -> None:
    (loose, *_), (trainer, done, own, rest) = one_update(
        tmp_path, past=past, factor=factor, operators=operators, clip_grad=0.05
    )
    assert done.note is None
    torch.nn.utils.clip_grad_norm_(loose.parts.bare.parameters(), 0.05)
    expected_own, expected_rest = gradients(loose)
    for after, expected in zip([*own, *rest], [*expected_own, *expected_rest], strict=True):
        assert torch.equal(after, expected)
    assert len(trainer.parts.watch.norms) == min(past + 1, watch.WINDOW)


class Bursting(Doomed):
    """The operators' gradients burst in the updates of each odd number from the 24th on."""

    def after_step(self) -> None:
        for handle in getattr(self, "handles", []):
            handle.remove()
        late = self.progress.step >= 24 and self.progress.step % 2
        self.handles = blow_up(self.parts.bare, 1e6) if late else []
        super().after_step()


RUN = {"attention": "g3b", "epochs": 4, "recovery_interval": 2, "clip_grad": 0.1}


@pytest.fixture(scope="module")
def bursting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with bursts in its last epochs, and what it said."""
    folder, said = tmp_path_factory.mktemp("bursting") / "run", io.StringIO()
    Bursting(Classification(), tiny(folder, **RUN), console=Console(file=said, width=300)).fit()
    return folder, said.getvalue()


def test_a_burst_is_told_of_once_an_epoch(bursting: tuple[Path, str]) -> None:
    folder, said = bursting
    lines = runs.read_history(folder)
    assert len(lines) == 4
    bursts = [line["operator_gradient_norm"] > 100 for line in lines]
    assert sum(bursts) >= 2
    assert said.count("the operators drive the gradient's norm") == sum(bursts)
    for line in lines:
        assert 0 < line["operator_gradient_norm"] <= line["grad_norm"] * 1.00001


@pytest.mark.parametrize("lives", [23, 26, 27])
def test_a_run_resumes_bit_equal_across_a_burst(tmp_path: Path, bursting: tuple[Path, str], lives: int) -> None:
    doomed = Bursting(Classification(), tiny(tmp_path / "run", **RUN))
    doomed.lives = lives
    with pytest.raises(CutOff):
        doomed.fit()
    resumed = Bursting(Classification(), tiny(tmp_path / "run", resume="auto", **RUN))
    assert len(resumed.parts.watch.norms) == resumed.progress.step > 0
    Bursting.after_step(resumed)  # what the update after the checkpoint is to see
    resumed.fit()
    assert outcome(tmp_path / "run") == outcome(bursting[0])


def test_a_checkpoint_without_the_norms_is_gone_on_with(tmp_path: Path) -> None:
    doomed = Doomed(Classification(), tiny(tmp_path / "run", recovery_interval=2, attention="g3b"))
    doomed.lives = 5
    with pytest.raises(CutOff):
        doomed.fit()
    train(tiny(tmp_path / "whole", recovery_interval=2, attention="g3b"))
    (*_, last) = checkpoint.listed(tmp_path / "run")
    state = files.read_json(last / checkpoint.STATE)
    del state["gradient_norms"], state["progress"]["largest_operator_norm"], state["progress"]["noted"]
    files.write_json(last / checkpoint.STATE, state)
    files.write_manifest(last)
    resumed = Trainer(Classification(), tiny(tmp_path / "run", recovery_interval=2, attention="g3b", resume="auto"))
    assert (resumed.notes, resumed.progress.step) == ([], 4)
    resumed.fit()
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]


def test_models_without_operators_are_not_watched(tmp_path: Path) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", epochs=1))
    trainer.fit()
    assert not trainer.parts.watch.operators
    assert not trainer.parts.watch.norms
    assert trainer.parts.watch.operator_norm() == []
    assert "operator_gradient_norm" not in runs.read_history(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("g3b,impl=tiled", "learnable attention runs in PyTorch, tile by tile"),
        ("g3b,impl=reference", "learnable attention runs in PyTorch, by the definition"),
        ("g3b,rank=None", "learnable attention runs in "),
        ("recommended", None),
    ],
)
def test_a_run_says_what_serves_its_attention(config: str, says: str | None) -> None:
    said: list[str] = []
    watch.name_kernel(nn.Sequential(KArAtOperator(3, 17, config)), said.append)
    assert [line[: len(str(says))] for line in said] == ([] if says is None else [says])
