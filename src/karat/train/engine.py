"""The training loop: updates, evaluation, checkpoints, and going on exactly where a run was cut off.

A run that is killed at any moment and resumed ends with the same bits as one that never was (one process, CPU,
float32): the loader's order and augmentation are functions of (seed, epoch, position), the random states that a step
draws from are saved with its weights, and whatever a resumed run does again (evaluating, opening the loader half-way)
happens aside of those states.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object, send_to_device
from rich.console import Console

from karat import runs
from karat.runs import checkpoint, files
from karat.runs.settings import RunSettings
from karat.train import faults, init, memory, optim, randomness, reports, state, step, track, watch
from karat.train.build import assemble, create_accelerator
from karat.train.snapshot import Progress, give, take
from karat.train.task import Batch, Task


class _Interrupted(Exception):
    """A signal came while evaluating."""


class Trainer:
    """One run, from settings to weights.

    Args:
        task: what kind of training it is.
        settings: what to train; `auto` values are resolved here.
        data: the task's data, where it is there already (`karat compare` shares it).
        console: where the main process prints progress; none prints nothing.

    Raises ValueError for settings that contradict each other, the data or the run's folder.
    """

    def __init__(
        self, task: Task[Any, Any], settings: RunSettings, data: Any = None, console: Console | None = None
    ) -> None:
        settings = task.resolve(settings)
        self.folder = runs.choose_folder(settings, runs.default_folder(settings))
        resuming = settings.resume is not None and runs.is_run(self.folder)
        if resuming:
            runs.check_same(self.folder, settings)
        else:
            runs.spare(self.folder, *settings.starts_from)
        self.task, self.settings, self.recipe = task, settings, settings.recipe
        self.accelerator = create_accelerator(settings)
        self.main = self.accelerator.is_main_process
        self.console = console if console is not None and self.main else Console(quiet=True)
        self.data = data or task.load_data(settings, self.accelerator)
        self.batches_per_epoch = len(self.data.train)
        updates = -(-self.batches_per_epoch // settings.grad_accum_steps)
        self.total_steps = self.recipe.epochs * updates
        resumed = self.folder if resuming else None
        self.parts = assemble(task, settings, self.accelerator, self.data, updates_per_epoch=updates, folder=resumed)
        if data is None and (found := task.found(self.data)):
            self.say(found)
        self.progress = Progress()
        self.changing = False  # weights and progress are being changed: not a moment to save
        self.notes = task.notes(self.data)
        self.step_seconds: list[float] = []  # of this epoch's updates since the start or the resumption
        (self._resume if resuming else self._begin)()
        if self.main:
            task.keep(settings, self.folder)

    # -- beginning, saving, resuming --------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.main:
            facts = self.task.facts(self.data)
            facts |= {"parameters": self.parts.parameters, "init": init.as_json(self.parts.loaded)}
            runs.begin(self.folder, self.settings, facts)
            if self.parts.loaded:
                self.console.print(init.table(self.parts.loaded, str(self.settings.init)))
                self.say(init.account(self.parts.loaded, str(self.settings.init)))
        self.accelerator.wait_for_everyone()
        self._note_the_start()

    def _note_the_start(self) -> None:
        """What is kept of the untrained model: the sizes of its operators, and its weights where a path is wanted."""
        self.progress.operators = watch.sizes(self.parts.bare)
        operators = bool(self.progress.operators)
        self.notes += optim.rate_notes(self.parts.schedule, self.settings, self.data.train, operators=operators)
        if self.settings.checkpoints == "trajectory":
            self._save_trajectory()

    def _resume(self) -> None:
        self.notes += runs.changed_counts(self.folder, self.settings, self.task.facts(self.data))
        found = checkpoint.newest(self.folder)
        if found is None:
            self.notes.append(f"{self.folder} was cut off before its first checkpoint: beginning again")
            self._note_the_start()
            return
        saved, refused = found
        self.notes += refused
        self.progress = give(self.parts, saved)
        self.parts.schedule.step_update(max(self.progress.step - 1, 0))  # the rate that an epoch's line reports
        if self.main:
            runs.tidy(self.folder)
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
            files.write_tensors(self.folder / runs.TRAJECTORY / name, weights)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch and return the run's summary (also in summary.json).

        Raises TrainingDiverged, OSError (disk full, worker died), KeyboardInterrupt and SystemExit(143), all
        of them after a checkpoint from which `--resume` goes on.
        """
        p, epochs = self.progress, self.recipe.epochs
        watch.name_kernel(self.parts.bare, self.say)
        for note in self.notes:
            self._warn(note)
        if p.epoch >= epochs:
            self._complete()
            return self._summary()
        memory.reset_peak()
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(faults.StopRequest())
            if self.main:
                stack.enter_context(runs.claimed(self.folder))
                self.trackers = track.trackers(self.settings.track, self.folder, self.settings.as_dict(), p.epoch)
                for tracker in self.trackers:
                    stack.callback(tracker.close)
            bar = track.Bar(self.console, self.settings.label, total=self.total_steps, done=p.step, epochs=epochs)
            self.bar = stack.enter_context(bar)
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

    def _complete(self) -> None:
        """Write what a run killed between its last checkpoint and its summary still lacks."""
        path = self.folder / runs.SUMMARY
        if not self.main or (path.is_file() and files.read_json(path).get("finished")):
            return
        runs.publish_weights(self.folder, self.folder / checkpoint.FOLDER / checkpoint.name_of(self.progress.step))
        files.write_json(path, self._summary())

    def _warn(self, note: str | None) -> None:
        if note is not None:
            self.say(f"note: {note}")

    def say(self, text: str) -> None:
        """Print a text as it stands."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _open_loader(self) -> Iterator[Batch]:
        """This epoch's batches from where the run stands, without touching the training's random states."""
        with randomness.aside(self.settings.seed + self.progress.epoch):
            self.data.train.set_epoch(self.progress.epoch)
            return iter(self.data.train.iter_from(self.progress.batch))

    def _train_epoch(self) -> None:
        p = self.progress
        self.parts.model.train()
        self.step_seconds.clear()
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
                self._warn(p.count(outcome))
            p.batch += len(group)
            p.step += 1
            self.changing = False
            spent = time.perf_counter() - began
            p.seconds += spent
            self.step_seconds.append(spent)
            images = sum(len(targets) for _, targets in group) * self.accelerator.num_processes
            self.bar.advance(p.epoch, outcome.loss, images / spent)
            self.after_step()
            if self._asked_to_stop():
                self._leave()
            interval = self.settings.recovery_interval
            if interval and p.step % interval == 0 and p.batch < self.batches_per_epoch:
                self.save()

    def after_step(self) -> None:
        """Called after each update; for subclasses that watch."""

    def _next(self, batches: Iterator[list[Batch]]) -> list[Batch] | None:
        """The next group of batches; when loading fails, what was reached is saved before the error goes on.

        Saving takes all processes: where there are several, the others wait in this update and can't be asked.
        """
        try:
            return next(batches, None)
        except ConnectionError:  # a worker's end of the pipe: see _worker_died
            raise
        except (ValueError, OSError):
            if self.accelerator.num_processes == 1:
                self.save()
            raise

    def _worker_died(self, error: Exception, reason: str) -> NoReturn:
        """Save, unless a change was under way or others would have to, and end with one line that says how to go on.

        torch reports the death by a signal, which may arrive anywhere: while loading, updating, evaluating, saving.
        """
        several = self.accelerator.num_processes > 1
        if self.stop.received is not None and not several:  # the signal reached the workers too, and they obeyed
            self._leave()
        if self.changing or several:
            raise OSError(f"{reason}; go on from the last checkpoint: --resume {self.folder}") from error
        try:
            self.save()
        except RuntimeError as late:  # the pipe broke first, the signal came now
            if faults.worker_death(late) is None:
                raise
            self.save()
        raise OSError(f"{reason}; saved at step {self.progress.step}: --resume {self.folder}") from error

    def _count_fault(self, outcome: step.Outcome, group: list[Batch]) -> None:
        """Count an update left out for a non-finite number; TrainingDiverged when there were too many."""
        p = self.progress
        if p.bad_steps < self.settings.max_bad_steps:
            p.bad_steps += 1
            return
        self.save()  # before a look at the batch, which may need more memory than there is
        images = send_to_device(group[-1][0], self.accelerator.device)
        why = faults.diagnose(self.parts.bare, images, step.bad_gradients(self.parts))
        found = f"now loss {outcome.loss:.4g}, gradient norm {outcome.norm:.4g}; {why}"
        raise faults.diverged(p.step, p.bad_steps + 1, found, self.folder)

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
        self.say(f"stopped at step {self.progress.step}; go on with: {self.settings.command} --resume {self.folder}")
        if self.stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _eval_batches(self) -> Iterator[Batch]:
        """The evaluation batches, as many on every process; a signal ends the run between two of them."""
        for batch in self.data.eval:
            if self._asked_to_stop():
                raise _Interrupted
            yield batch

    def _evaluate(self) -> dict[str, float]:
        """The model as it stands on the evaluation set, and the averaged weights beside it."""
        with randomness.aside(self.settings.seed):
            line = self.task.evaluate(self.parts.bare, self._eval_batches(), self.accelerator, self.data)
        if self.parts.ema is not None:
            with randomness.aside(self.settings.seed), self.parts.ema.lent():
                averaged = self.task.evaluate(self.parts.bare, self._eval_batches(), self.accelerator, self.data)
                line[f"ema_{self.task.metric}"] = averaged[self.task.metric]
        with randomness.aside(self.settings.seed):
            line |= self.task.also_measured(self.settings, self.parts.bare, self.accelerator, self.data)
        return line

    def _close_epoch(self) -> None:
        """Evaluate, save, and report one epoch."""
        p = self.progress
        try:
            measured = self._evaluate()
        except _Interrupted:
            self._leave()
        self.changing = True
        p.epoch, p.batch = p.epoch + 1, 0
        line = reports.epoch_line(
            p,
            measured,
            lr=optim.base_rate(self.parts.optimizer),
            images=self.data.train.num_samples,
            bad_images=len(set(gather_object(list(self.data.train.bad.names)))),
            step_seconds=self.step_seconds,
            device=self.accelerator.device,
        )
        if self.parts.watch.operators:
            line["operator_gradient_norm"] = p.largest_operator_norm
        if p.operators:
            line["operator_growth"], where = watch.growth(p.operators, watch.sizes(self.parts.bare))
            self._warn(watch.warning(line["operator_growth"], where))
        p.history.append(line)
        p.end_epoch()
        metric = self.task.metric
        if not p.best or line[metric] > p.best[metric]:
            p.best = {metric: line[metric], "epoch": p.epoch, "checkpoint": checkpoint.name_of(p.step)}
        if self.settings.checkpoints == "trajectory":  # first: a run that goes on from the checkpoint lacks none
            self._save_trajectory()
        self.changing = False
        self.save()
        if self.main:
            runs.write_history(self.folder, p.history)
            runs.publish_weights(self.folder, self.saved)
            files.write_json(self.folder / runs.SUMMARY, self._summary())
            for tracker in self.trackers:
                tracker.log({k: float(v) for k, v in line.items() if k != "epoch"}, p.epoch)
            typical = statistics.median(entry["seconds"] for entry in p.history)
            self.bar.epoch(line, self.task.epoch_line(line), typical * (self.recipe.epochs - p.epoch))
        self.accelerator.wait_for_everyone()  # no process goes on, to evaluate say, before the run is written

    def _summary(self) -> dict[str, Any]:
        p, figures = self.progress, self.task.summary(self.progress.history)
        finished = p.epoch >= self.recipe.epochs
        return reports.summary(self.folder, self.settings, figures, self.parts.parameters, p, finished=finished)


def __getattr__(name: str) -> Any:  # the old path of karat.train.classify.train, which imports this file
    if name == "train":
        return importlib.import_module("karat.train.classify").train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
