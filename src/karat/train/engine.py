"""The training loop: updates, evaluation, checkpoints, and going on exactly where a run was cut off.

A run that is killed at any moment and resumed ends with the same bits as one that never was (one process, CPU,
float32): the loader's order and augmentation are functions of (seed, epoch, position), the random states that a step
draws from are saved with its weights, and whatever a resumed run does again (evaluating, opening the loader half-way)
happens aside of those states.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from rich.console import Console

from karat.train import checkpoint, faults, files, init, memory, randomness, runs, state, step, track
from karat.train.build import assemble, create_accelerator, input_size
from karat.train.data import Data, load_data
from karat.train.evaluate import evaluate
from karat.train.settings import Settings, first_change, resolve
from karat.train.snapshot import Progress, give, take


class _Interrupted(Exception):
    """A signal came while evaluating."""


class Trainer:
    """One run, from settings to weights.

    Args:
        settings: what to train; `auto` values are resolved here.
        data: the loaders, where they are there already (`karat compare` shares them).
        console: where progress is printed; none prints nothing.

    Raises ValueError for settings that contradict each other, the data or the run's folder.
    """

    def __init__(self, settings: Settings, *, data: Data | None = None, console: Console | None = None) -> None:
        settings = resolve(settings)
        self.folder = runs.choose_folder(settings, runs.default_folder(settings))
        resuming = settings.resume is not None and runs.is_run(self.folder)
        if resuming:
            saved, facts = runs.read_config(self.folder)
            if "converted_from" in facts:
                raise ValueError(f"{self.folder} was converted, not trained: start a new run with --init {self.folder}")
            change = first_change(saved, settings)
            if change is not None:
                raise ValueError(f"{self.folder} can't go on under other settings: {change}")
        self.settings, self.recipe = settings, settings.recipe
        self.accelerator = create_accelerator(settings)
        self.console = console or Console(quiet=True)
        self.main = self.accelerator.is_main_process
        self.data = data or self._load_data()
        classes = self.data.num_classes
        self.batches_per_epoch = len(self.data.train)
        updates = -(-self.batches_per_epoch // settings.grad_accum_steps)
        self.total_steps = self.recipe.epochs * updates
        self.parts = assemble(
            settings, self.accelerator, classes=classes, in_chans=self.data.in_chans, updates_per_epoch=updates
        )
        self.progress = Progress()
        self.changing = False  # weights and progress are being changed: not a moment to save
        self.notes: list[str] = []
        if resuming:
            self._resume()
        else:
            self._begin(classes)

    def _load_data(self) -> Data:
        s = self.settings
        return load_data(
            s.data,
            img_size=s.img_size or input_size(s.model),
            recipe=self.recipe,
            workers=s.workers,
            seed=s.seed,
            on_bad_image=s.on_bad_image,
            num_classes=s.num_classes,
            fraction=s.data_fraction,
            data_dir=s.data_dir,
            num_samples=s.num_samples,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    # -- beginning, saving, resuming --------------------------------------------------------------------------------

    def _begin(self, classes: int) -> None:
        if self.main:
            facts: dict[str, Any] = {
                "num_classes": classes,
                "class_names": list(self.data.class_names),
                "in_chans": self.data.in_chans,
            }
            facts |= {"parameters": self.parts.parameters, "init": init.as_json(self.parts.loaded)}
            runs.begin(self.folder, self.settings, facts)
            if self.parts.loaded:
                self.console.print(init.table(self.parts.loaded, str(self.settings.init)))
        self.accelerator.wait_for_everyone()
        if self.settings.checkpoints == "trajectory":
            self._save_trajectory()

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder)
        if found is None:
            self.notes.append(f"{self.folder} was cut off before its first checkpoint: beginning again")
            return
        saved, refused = found
        self.notes += refused
        self.progress = give(self.parts, saved)
        self.parts.schedule.step_update(max(self.progress.step - 1, 0))  # the rate that an epoch's line reports
        if self.main:
            runs.write_history(self.folder, self.progress.history)

    def save(self) -> None:
        """Write a full-state checkpoint of this moment."""
        taken = take(self.parts, self.progress)
        if self.main:
            self.saved = checkpoint.write(self.folder, taken, keep=self.settings.checkpoint_hist)
        self.accelerator.wait_for_everyone()

    def _save_trajectory(self) -> None:
        weights = state.model_state(self.accelerator, self.parts.model)
        if self.main:
            (self.folder / runs.TRAJECTORY).mkdir(exist_ok=True)
            name = f"epoch-{self.progress.epoch:04d}.safetensors"
            files.replace_tensors(self.folder / runs.TRAJECTORY / name, weights)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch and return the run's summary (also in summary.json).

        Raises faults.TrainingDiverged, OSError (disk full, worker died), KeyboardInterrupt and SystemExit(143), all
        of them after a checkpoint from which `--resume` goes on.
        """
        p, epochs = self.progress, self.recipe.epochs
        for note in self.notes:
            self.console.print(f"note: {note}", highlight=False, soft_wrap=True)
        if p.epoch >= epochs:
            return self._summary()
        label = str(self.settings.attention)
        config = self.settings.as_dict()
        names = self.settings.track if self.main else ()
        memory.reset_peak()
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(faults.StopRequest())
            self.trackers = track.trackers(names, self.folder, config, p.epoch)
            for tracker in self.trackers:
                stack.callback(tracker.close)
            self.bar = stack.enter_context(
                track.Bar(self.console, label, total=self.total_steps, done=p.step, epochs=epochs, visible=self.main)
            )
            try:
                while p.epoch < epochs:
                    self._train_epoch()
                    self._close_epoch()
            except (RuntimeError, EOFError, ConnectionError) as error:
                reason = faults.worker_death(error)
                if reason is None:
                    raise
                self._worker_died(error, reason)
        return self._summary()

    def _open_loader(self) -> Iterator[step.Batch]:
        """This epoch's batches from where the run stands, without touching the training's random states."""
        with randomness.aside(self.settings.seed + self.progress.epoch):
            self.data.train.set_epoch(self.progress.epoch)
            return iter(self.data.train.iter_from(self.progress.batch))

    def _train_epoch(self) -> None:
        p = self.progress
        self.parts.model.train()
        batches = step.chunks(self._open_loader(), self.settings.grad_accum_steps)
        while p.batch < self.batches_per_epoch:
            began = time.perf_counter()
            group = self._next(batches)
            if group is None:  # images left out as undecodable filled these batches
                break
            self.changing = True
            outcome = step.update(self.parts, p.step, group)
            if outcome.fault:
                self._count_fault(outcome, group)
            elif outcome.applied:
                p.loss_sum += outcome.loss
                p.applied += 1
            p.batch += len(group)
            p.step += 1
            self.changing = False
            spent = time.perf_counter() - began
            p.seconds += spent
            images = sum(len(labels) for _, labels in group) * self.accelerator.num_processes
            self.bar.advance(p.epoch, outcome.loss, images / spent)
            self.after_step()
            if self._asked_to_stop():
                self._leave()
            interval = self.settings.recovery_interval
            if interval and p.step % interval == 0 and p.batch < self.batches_per_epoch:
                self.save()

    def after_step(self) -> None:
        """Called after each update; for subclasses that watch."""

    def _next(self, batches: Iterator[list[step.Batch]]) -> list[step.Batch] | None:
        """The next group of batches; when loading fails, what was reached is saved before the error goes on."""
        try:
            return next(batches, None)
        except ConnectionError:  # a worker's end of the pipe: see _worker_died
            raise
        except (ValueError, OSError):
            self.save()
            raise

    def _worker_died(self, error: Exception, reason: str) -> NoReturn:
        """Save, unless a change was under way, and end with one line that says how to go on.

        torch reports the death by a signal, which may arrive anywhere: while loading, updating, evaluating, saving.
        """
        if self.stop.received is not None:  # the signal reached the workers too, and they obeyed
            self._leave()
        if self.changing:
            raise OSError(f"{reason}; go on from the last checkpoint: --resume {self.folder}") from error
        try:
            self.save()
        except RuntimeError as late:  # the pipe broke first, the signal came now
            if faults.worker_death(late) is None:
                raise
            self.save()
        raise OSError(f"{reason}; saved at step {self.progress.step}: --resume {self.folder}") from error

    def _count_fault(self, outcome: step.Outcome, group: list[step.Batch]) -> None:
        """Count an update left out for a non-finite number; TrainingDiverged when there were too many."""
        p = self.progress
        if p.bad_steps < self.settings.max_bad_steps:
            p.bad_steps += 1
            return
        images = group[-1][0].to(self.accelerator.device)
        why = faults.diagnose(self.parts.bare, images, step.bad_gradients(self.parts))
        self.save()
        raise faults.TrainingDiverged(
            f"stopped at step {p.step}: {p.bad_steps + 1} updates had a non-finite loss or gradient (now loss "
            f"{outcome.loss:.4g}, gradient norm {outcome.norm:.4g}); {why}. The last good state is saved in "
            f"{self.folder}: begin again with a lower --lr, --coefficient-lr or --clip-grad, or go on with --resume "
            "and a higher --max-bad-steps"
        )

    def _asked_to_stop(self) -> bool:
        """Whether a signal came, to any of the processes."""
        received = self.stop.received is not None
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor(float(received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def _leave(self) -> NoReturn:
        """Save and end as the signal asks: KeyboardInterrupt, or exit status 143 for SIGTERM."""
        self.save()
        self.console.print(
            f"stopped at step {self.progress.step}; go on with: karat train --resume {self.folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self.stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _eval_batches(self) -> Iterator[step.Batch]:
        """The evaluation batches; a signal ends the run between two of them (with one process only: several must
        agree on when to stop, and do so after the next update)."""
        for batch in self.data.eval:
            if self.stop.received is not None and self.accelerator.num_processes == 1:
                raise _Interrupted
            yield batch

    def _evaluate(self) -> dict[str, float]:
        """The model as it stands on the evaluation set, and the averaged weights beside it."""
        with randomness.aside(self.settings.seed):
            line = evaluate(self.parts.bare, self._eval_batches(), self.accelerator)
        if self.parts.ema is not None:
            with randomness.aside(self.settings.seed), self.parts.ema.lent():
                line["ema_top1"] = evaluate(self.parts.bare, self.data.eval, self.accelerator)["top1"]
        return line

    def _close_epoch(self) -> None:
        """Evaluate, save, and report one epoch."""
        p = self.progress
        seconds = p.seconds
        try:
            measured = self._evaluate()
        except _Interrupted:
            self._leave()
        self.changing = True
        p.epoch, p.batch = p.epoch + 1, 0
        line = {
            "epoch": p.epoch,
            "step": p.step,
            "lr": self.parts.optimizer.param_groups[0]["lr"],
            "train_loss": p.loss_sum / max(p.applied, 1),
            **measured,
            "seconds": seconds,
            "images_per_second": self.data.train.num_samples / max(seconds, 1e-9),
            "peak_memory_mib": memory.peak_mib(self.accelerator.device),
            "bad_steps": p.bad_steps,
            "bad_images": self.data.bad_images,
        }
        p.history.append(line)
        p.loss_sum, p.applied, p.seconds = 0.0, 0, 0.0
        if not p.best or line["top1"] > p.best["top1"]:
            p.best = {"top1": line["top1"], "epoch": p.epoch, "checkpoint": checkpoint.name_of(p.step)}
        self.changing = False
        self.save()
        if self.settings.checkpoints == "trajectory":
            self._save_trajectory()
        if self.main:
            runs.write_history(self.folder, p.history)
            runs.publish_weights(self.folder, self.saved)
            files.write_json(self.folder / runs.SUMMARY, self._summary())
            for tracker in self.trackers:
                tracker.log({k: float(v) for k, v in line.items() if k != "epoch"}, p.epoch)
            typical = statistics.median(entry["seconds"] for entry in p.history)
            self.bar.epoch(line, typical * (self.recipe.epochs - p.epoch))

    def _summary(self) -> dict[str, Any]:
        p = self.progress
        return {
            "folder": os.fspath(self.folder),
            "model": self.settings.model,
            "attention": self.settings.attention,
            "seed": self.settings.seed,
            "epochs": p.epoch,
            "finished": p.epoch >= self.recipe.epochs,
            "parameters": self.parts.parameters,
            "top1": p.history[-1]["top1"] if p.history else None,
            "top5": p.history[-1]["top5"] if p.history else None,
            "best": p.best,
            # the median: the first epoch also pays for what torch and kernels set up once
            "seconds_per_epoch": statistics.median([e["seconds"] for e in p.history] or [0.0]),
            "peak_memory_mib": max((e["peak_memory_mib"] for e in p.history), default=0.0),
        }


def train(settings: Settings, *, data: Data | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run `settings` to the end, or go on with the run they name, and return its summary."""
    return Trainer(settings, data=data, console=console).fit()
