"""A run's whole state taken into a checkpoint and given back: tensors, counters, random states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object

from karat.runs.checkpoint import Checkpoint, name_of
from karat.train import randomness, state
from karat.train.build import Parts
from karat.train.step import Outcome


@dataclass
class Progress:
    """Where a run stands; all of it is saved, so all of it is plain JSON."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already used, per process
    step: int = 0  # updates made or skipped since the start
    loss_sum: float = 0.0  # over this epoch's updates that counted
    applied: int = 0
    seconds: float = 0.0  # spent in this epoch so far
    largest_norm: float = 0.0  # of this epoch's gradients, before clipping
    largest_operator_norm: float = 0.0  # of the operators' part of them
    noted: bool = False  # whether this epoch has said something of its updates
    bad_steps: int = 0
    operators: dict[str, float] = field(default_factory=dict)  # sizes at the start, see `watch`
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    def count(self, outcome: Outcome) -> str | None:
        """Take in an update that was applied; the first thing of an epoch that there is to say is returned."""
        self.loss_sum += outcome.loss
        self.largest_norm = max(self.largest_norm, outcome.norm)
        self.largest_operator_norm = max(self.largest_operator_norm, outcome.operator_norm)
        self.applied += 1
        if outcome.note is None or self.noted:
            return None
        self.noted = True
        return outcome.note

    def end_epoch(self) -> None:
        """Forget what is counted within an epoch."""
        self.loss_sum, self.applied, self.seconds, self.noted = 0.0, 0, 0.0, False
        self.largest_norm = self.largest_operator_norm = 0.0


def take(parts: Parts, progress: Progress) -> Checkpoint:
    """The state of this moment. Every process must call it; the main one's answer is whole."""
    accelerator = parts.accelerator
    averaged = None
    if parts.ema is not None:
        with parts.ema.lent():
            lent = state.model_state(accelerator, parts.model)
            averaged = {name: tensor.detach().clone() for name, tensor in lent.items()}
    scaler = accelerator.scaler
    return Checkpoint(
        model=state.model_state(accelerator, parts.model),
        optimizer=state.optimizer_state(accelerator, parts.model, parts.optimizer.optimizer),
        ema=averaged,
        state={
            "step": progress.step,
            "progress": vars(progress),
            "best": progress.best,
            "random": gather_object([randomness.capture()]),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "gradient_norms": list(parts.watch.norms),
        },
    )


def give(parts: Parts, saved: Checkpoint) -> Progress:
    """Put a run back where `saved` was taken; ValueError names what does not fit."""
    accelerator = parts.accelerator
    where = f"checkpoint {name_of(saved.state['step'])}"
    processes = len(saved.state["random"])
    if processes != accelerator.num_processes:
        raise ValueError(
            f"{where} was saved by {processes} processes and {accelerator.num_processes} are here: "
            "resume with as many, or begin a new run with --init"
        )
    if parts.ema is not None:
        if saved.ema is None:
            raise ValueError(f"{where} has no averaged weights, which model_ema_decay asks for")
        state.load_model_state(accelerator, parts.model, saved.ema, where)
        parts.ema.restart()
    state.load_model_state(accelerator, parts.model, saved.model, where)
    optimizer, updates = parts.optimizer.optimizer, saved.state["step"]
    state.load_optimizer_state(accelerator, parts.model, optimizer, saved.optimizer, updates)
    if accelerator.scaler is not None and saved.state["scaler"]:
        accelerator.scaler.load_state_dict(saved.state["scaler"])
    parts.watch.norms.clear()
    parts.watch.norms.extend(saved.state.get("gradient_norms", []))  # older checkpoints have none
    randomness.restore(saved.state["random"][accelerator.process_index])
    try:
        return Progress(**saved.state["progress"])
    except TypeError as error:
        raise ValueError(f"{where} is of another version of karat: {error}") from None
