"""What the training loop promises: faults counted, signals obeyed after saving, several processes as one."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from karat import runs
from karat.errors import TrainingDiverged
from karat.runs import checkpoint, files
from karat.runs.model import plain_model
from karat.train import faults, step, watch
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from karat.train.snapshot import take
from support.interrupted import CutOff
from support.pictures import images
from support.processes import python
from support.training import NOISY, outcome, tiny


class Poisoned(Trainer):
    """Its batches hold a NaN from the update `start` on, every `period`-th."""

    start, period = 2, 3

    def _next(self, batches):  # type: ignore[no-untyped-def]
        group = super()._next(batches)
        if (
            group is not None
            and self.progress.step >= self.start
            and (self.progress.step - self.start) % self.period == 0
        ):
            group = [(images.clone().index_fill_(0, torch.tensor([0]), torch.nan), labels) for images, labels in group]
        return group


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    summary = Poisoned(Classification(), tiny(tmp_path / "run", model_ema_decay=0.9)).fit()
    last = runs.read_history(tmp_path / "run")[-1]
    assert summary["finished"]
    assert last["bad_steps"] == len(range(2, last["step"], 3))
    for name in ("model.safetensors", "ema.safetensors"):
        assert all(torch.isfinite(t).all() for t in files.read_tensors(tmp_path / "run" / name).values())
    assert torch.isfinite(torch.tensor(last["train_loss"]))


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", attention="g3b"))
    images, labels = next(iter(trainer.data.train))
    step.update(trainer.parts, 5, [(images, labels)])
    before = take(trainer.parts, trainer.progress)
    kept = {name: tensor.clone() for name, tensor in {**before.model, **before.optimizer}.items()}
    done = step.update(trainer.parts, 6, [(images * torch.inf, labels)])
    assert done.fault
    assert not done.applied
    after = take(trainer.parts, trainer.progress)
    for name, tensor in {**after.model, **after.optimizer}.items():
        assert torch.equal(tensor, kept[name]), name


def test_a_skipped_step_leaves_running_statistics_alone(tmp_path: Path) -> None:
    sizes = {"model": "xcit_nano_12_p8_224", "img_size": 16, "patch_size": None, "depth": 1}
    trainer = Trainer(Classification(), tiny(tmp_path / "run", **sizes))
    images, labels = next(iter(trainer.data.train))
    kept = {name: tensor.clone() for name, tensor in trainer.parts.bare.named_buffers()}
    for batch, moved in ((images * torch.inf, False), (images, True)):
        assert step.update(trainer.parts, 5, [(batch, labels)]).applied == moved
        found = {name for name, tensor in trainer.parts.bare.named_buffers() if not torch.equal(tensor, kept[name])}
        assert any("running_mean" in name for name in found) == moved


def test_an_epoch_without_an_update_has_no_training_loss(tmp_path: Path) -> None:
    doomed = Poisoned(Classification(), tiny(tmp_path / "run", epochs=1))
    doomed.start, doomed.period = 0, 1
    doomed.fit()
    assert math.isnan(runs.read_history(tmp_path / "run")[-1]["train_loss"])


def test_a_diagnosis_that_fails_comes_after_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> str:
        raise MemoryError

    monkeypatch.setattr(faults, "diagnose", broken)
    with pytest.raises(MemoryError):
        Poisoned(Classification(), tiny(tmp_path / "run", max_bad_steps=0)).fit()
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert found[0].state["step"] == 2


def test_too_many_non_finite_steps_stop_with_a_diagnosis_and_the_last_good_state(tmp_path: Path) -> None:
    trainer = Poisoned(Classification(), tiny(tmp_path / "run", attention="g3b", max_bad_steps=1))
    with pytest.raises(TrainingDiverged, match=r"2 updates had a non-finite loss.*pixels"):
        trainer.fit()
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert all(torch.isfinite(t).all() for t in found[0].model.values())
    summary = train(tiny(tmp_path / "run", attention="g3b", max_bad_steps=50, resume="auto"))
    assert summary["finished"]


def test_diagnosis_names_the_block_and_its_score_range(tmp_path: Path) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", attention="g3b", max_bad_steps=0))
    with torch.no_grad():  # finite weights whose product overflows in the second block
        trainer.parts.bare.blocks[1].attn.qkv.weight.mul_(1e38)  # type: ignore[union-attr, operator]
        trainer.parts.bare.blocks[1].norm1.weight.mul_(1e3)  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingDiverged, match=r"blocks\.1\..* attention scores in blocks\.1\.attn: "):
        trainer.fit()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["update", "evaluation"])
def test_a_signal_leaves_a_run_that_resumes_bit_equal(tmp_path: Path, number: signal.Signals, where: str) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run", attention="g3b", **NOISY))

    def strike() -> None:
        if trainer.progress.step == 12:
            os.kill(os.getpid(), number)

    class Striking:
        def __init__(self, loader: object) -> None:
            self.loader = loader

        def __iter__(self):  # type: ignore[no-untyped-def]
            os.kill(os.getpid(), number)
            yield from self.loader  # type: ignore[misc]

    if where == "update":
        trainer.after_step = strike  # type: ignore[method-assign]
    else:
        trainer.data.__dict__["eval"] = Striking(trainer.data.eval)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as stopped:
        trainer.fit()
    if number == signal.SIGTERM:
        assert stopped.value.code == 143
    assert trainer.progress.epoch < 3
    train(tiny(tmp_path / "run", attention="g3b", resume="auto", **NOISY))
    train(tiny(tmp_path / "whole", attention="g3b", **NOISY))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_gradients_of_accumulated_batches_are_those_of_one_batch(tmp_path: Path) -> None:
    """Data order is by position, so two batches of 8 are the batch of 16."""
    losses = []
    for values in ({"batch_size": 16}, {"batch_size": 8, "grad_accum_steps": 2}):
        folder = tmp_path / str(values["batch_size"])
        train(tiny(folder, attention="g3b", hflip=0.0, train_crop_mode="pad", **values))
        losses.append([line["eval_loss"] for line in runs.read_history(folder)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_grad_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        train(tiny(tmp_path / name, attention="g3b", grad_checkpointing=on, epochs=1))
    plain, recomputed = (runs.read_history(tmp_path / name)[-1]["train_loss"] for name in ("off", "on"))
    assert plain == pytest.approx(recomputed, abs=1e-6)


def test_a_model_that_cannot_recompute_is_refused(tmp_path: Path) -> None:
    sizes = {"depth": 1, "embed_dim": 8, "num_heads": 2, "img_size": 16}
    with pytest.raises(ValueError, match="convit_tiny can't recompute activations: leave --grad-checkpointing out"):
        Trainer(Classification(), tiny(tmp_path / "run", model="convit_tiny", grad_checkpointing=True, **sizes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [{"patch_size": 9}, {"recovery_interval": -1}])
def test_settings_that_fit_no_run_are_refused(tmp_path: Path, values: dict[str, int]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tiny(tmp_path, **values)
    with pytest.raises(ValueError, match="img_size=224 is smaller than a patch of 300 pixels"):
        plain_model(tiny(tmp_path, img_size=None, patch_size=300), 10, 1)


def test_bfloat16_trains(tmp_path: Path) -> None:
    summary = train(tiny(tmp_path / "run", attention="g3b", amp_dtype="bfloat16", epochs=1))
    assert summary["finished"]
    weights = files.read_tensors(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_trajectory_keeps_every_epoch_from_the_start(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", checkpoints="trajectory"))
    kept = sorted((tmp_path / "run" / runs.TRAJECTORY).iterdir())
    assert [path.stem for path in kept] == [f"epoch-{number:04d}" for number in range(4)]
    last = files.read_tensors(kept[-1])
    assert all(torch.equal(last[n], t) for n, t in files.read_tensors(tmp_path / "run" / "model.safetensors").items())


def test_a_trajectory_lacks_no_epoch_of_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = Trainer(Classification(), tiny(tmp_path / "run", checkpoints="trajectory"))
    saved = doomed.save

    def dying() -> None:
        saved()
        raise CutOff

    monkeypatch.setattr(doomed, "save", dying)
    with pytest.raises(CutOff):
        doomed.fit()
    assert len(checkpoint.listed(tmp_path / "run")) == 1
    assert [path.stem for path in sorted((tmp_path / "run" / runs.TRAJECTORY).iterdir())] == [
        "epoch-0000",
        "epoch-0001",
    ]


def test_universal_operator_is_saved_once(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", attention="g3u", epochs=1, model_ema_decay=0.9))
    for name in ("model.safetensors", "ema.safetensors"):
        names = files.read_tensors(tmp_path / "run" / name)
        assert sum(name.endswith("coefficients") for name in names) == 1


def test_a_dead_data_worker_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    settings = tiny(
        tmp_path / "run", data=str(folder), workers=1, train_crop_mode="rrc", data_fraction=1.0, batch_size=4
    )
    trainer = Trainer(Classification(), settings)

    def strike() -> None:
        if trainer.progress.step == 2:
            for worker in multiprocessing.active_children():  # not what forks the tests' processes
                worker.kill()
            time.sleep(60)  # torch's handler of the death's signal interrupts this: here, and not in an update

    trainer.after_step = strike  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"worker died.*saved at step"):
        trainer.fit()
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert found[0].state["step"] >= 2


def test_a_worker_that_dies_in_the_middle_of_an_update_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal that reports the death may arrive when half of the weights are new: that state isn't saved."""
    trainer = Trainer(Classification(), tiny(tmp_path / "run", recovery_interval=1))
    real = step.update

    def interrupted(parts: step.Parts, number: int, group: list[step.Batch]) -> step.Outcome:
        outcome = real(parts, number, group)
        if number == 2:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return outcome

    monkeypatch.setattr(step, "update", interrupted)
    with pytest.raises(OSError, match=r"worker died.*go on from the last checkpoint"):
        trainer.fit()
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert found[0].state["step"] == 2


def test_a_worker_that_a_signal_ended_saves_nothing_that_others_would_have_to_save_too(tmp_path: Path) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run"))
    trainer.stop = faults.StopRequest()
    trainer.stop.received = signal.SIGTERM
    trainer.accelerator = SimpleNamespace(num_processes=2)  # type: ignore[assignment]
    with pytest.raises(OSError, match="go on from the last checkpoint"):
        trainer._worker_died(RuntimeError(), "a data worker died")
    assert checkpoint.newest(tmp_path / "run") is None


def test_other_errors_are_not_blamed_on_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Classification(), tiny(tmp_path / "run"))

    def broken(*arguments: object) -> step.Outcome:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(step, "update", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.fit()


def test_operators_that_grow_are_reported_and_warned_of(tmp_path: Path) -> None:
    said = io.StringIO()
    wild = tiny(tmp_path / "wild", attention="g3b", operator_lr_scale=1e4, epochs=2, warmup_epochs=0)
    train(wild, console=Console(file=said, width=200))
    text = said.getvalue()
    assert "the operators learn at 10000 times the rate" in text
    assert "has grown to" in text
    assert "--operator-lr-scale" in text
    lines = runs.read_history(tmp_path / "wild")
    assert lines[-1]["operator_growth"] > watch.LIMIT
    assert lines[-1]["grad_norm"] > 0
    said = io.StringIO()
    train(tiny(tmp_path / "calm", attention="g3b", epochs=1), console=Console(file=said, width=200))
    assert "note" not in said.getvalue()
    assert 0.5 < runs.read_history(tmp_path / "calm")[-1]["operator_growth"] < 2
    train(tiny(tmp_path / "plain", epochs=1))
    assert "operator_growth" not in runs.read_history(tmp_path / "plain")[-1]


def test_a_bad_image_ends_the_run_by_name_or_is_counted(tmp_path: Path) -> None:
    folder = images(tmp_path / "data")
    (folder / "train" / "class0" / "0.png").write_bytes(b"no image")
    values = {"data": str(folder), "train_crop_mode": "rrc", "data_fraction": 1.0, "batch_size": 4, "epochs": 1}
    with pytest.raises(ValueError, match=r"0\.png"):
        train(tiny(tmp_path / "stopped", **values))
    train(tiny(tmp_path / "skipped", on_bad_image="skip", **values))
    assert runs.read_history(tmp_path / "skipped")[-1]["bad_images"] == 1


def test_signals_are_left_alone_outside_the_main_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(tmp_path / "run", epochs=1))))
    thread.start()
    thread.join()
    assert results[0]["finished"]


DISTRIBUTED = """
import json, sys
from pathlib import Path
from support.processes import shard, twice
from support.training import tiny
from karat.train import engine, step
from karat.train.classify import Classification
folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
losses, plain = [], step.update
def noted(*arguments):
    done = plain(*arguments)
    losses.append(done.loss)
    return done
step.update = noted
def work():
    if sys.argv[3] == "sharded":
        shard()
    trainer = engine.Trainer(Classification(), tiny(folder, attention="g3b", **values))
    trainer.fit()
    if trainer.main:
        trainer.folder.joinpath("losses.json").write_text(json.dumps(losses))
twice(work)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_two_processes_train_and_evaluate_as_one_and_resume(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of 10 and more updates equals that of one process with the same total batch; so do all counts.

    Of 33 evaluation images one process has three batches and the other two.
    """
    single, plain = [], step.update

    def noted(*arguments: object) -> step.Outcome:
        done = plain(*arguments)  # type: ignore[arg-type]
        single.append(done.loss)
        return done

    two = {"batch_size": 8, "data_fraction": 0.092, "model_ema_decay": 0.95, "lr": 0.05, "warmup_epochs": 0}
    done = python(DISTRIBUTED, str(tmp_path / "two"), json.dumps(two), layout, timeout=300)
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(step, "update", noted)
        train(tiny(tmp_path / "one", attention="g3b", **{**two, "batch_size": 16}))
    assert len(single) >= 10
    assert single == pytest.approx(json.loads((tmp_path / "two" / "losses.json").read_text()), abs=1e-5)
    for left, right in zip(runs.read_history(tmp_path / "one"), runs.read_history(tmp_path / "two"), strict=True):
        assert left["images"] == right["images"] == 33
        assert left["top1"] == right["top1"]
        assert left["ema_top1"] == right["ema_top1"]
        assert left["eval_loss"] == pytest.approx(right["eval_loss"], abs=1e-5)
    assert left["ema_top1"] != left["top1"]
    # the same two processes, stopped after the second epoch's checkpoint and resumed, end bit-equal
    for path in checkpoint.listed(tmp_path / "two")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    before = outcome(tmp_path / "two")
    done = python(DISTRIBUTED, str(tmp_path / "two"), json.dumps({**two, "resume": "auto"}), layout, timeout=300)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "two") == before


ENDING = """
import json, os, signal, sys
from pathlib import Path
from support.processes import shard, twice
from support.training import tiny
from karat.errors import TrainingDiverged
from karat.train import engine
from karat.train.classify import Classification
folder = Path(sys.argv[1])
def trainer(name, **values):
    given = {"data_fraction": 0.092, "batch_size": 8, "epochs": 1, "model_ema_decay": 0.9, **values}
    return engine.Trainer(Classification(), tiny(folder / name, attention="g3b", **given))
def spoilt(plain):
    return lambda start: ((images * float("nan"), labels) for images, labels in plain(start))
def struck(plain):
    def batches(start):
        for batch in plain(start):
            yield batch
            os.kill(os.getpid(), signal.SIGTERM)
    return batches
def work():
    shard()
    bad = trainer("bad", max_bad_steps=0)
    rank, ends = bad.accelerator.process_index, []
    if rank:
        bad.data.train.iter_from = spoilt(bad.data.train.iter_from)
    try:
        bad.fit()
    except TrainingDiverged as error:
        ends.append(str(error))
    cut = trainer("cut")  # a second run of the same processes
    if rank:
        cut.data.eval.iter_from = struck(cut.data.eval.iter_from)
    try:
        cut.fit()
    except SystemExit as error:
        ends += [error.code, cut.progress.step, cut.progress.epoch]
    ends.append(trainer("cut", resume="auto").fit()["finished"])
    (folder / f"{rank}.json").write_text(json.dumps(ends))
twice(work)
"""


@pytest.mark.slow
def test_what_befalls_one_of_two_sharded_processes_ends_both_alike(tmp_path: Path) -> None:
    """A batch that isn't finite, and a signal while evaluating; what is looked at and saved then takes both."""
    done = python(ENDING, str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr
    for rank, why in enumerate(("the forward pass is finite", "the batch itself holds non-finite pixels")):
        said, *rest = json.loads((tmp_path / f"{rank}.json").read_text())
        assert why in said
        assert rest == [143, 8, 0, True]


LEAVING = """
import atexit, os, sys
from pathlib import Path
from torch import distributed
from support.training import tiny
from karat.train import engine
from karat.train.classify import Classification
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
pids = []
for end in ("done", "error", "signal"):
    if not (pid := os.fork()):  # torch is imported once; the parent runs no kernel, so a fork is safe
        break
    pids.append(pid)
else:
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    raise SystemExit
atexit.register(lambda: print(end, distributed.is_initialized(), flush=True))  # registered first, runs last
distributed.init_process_group("gloo")
trainer = engine.Trainer(Classification(), tiny(Path(sys.argv[1]) / end, epochs=1))
if end == "error":
    raise ValueError("on purpose")
trainer.fit()
if end == "signal":
    raise SystemExit(143)
"""


@pytest.mark.slow
def test_the_process_group_is_left_however_a_process_ends(tmp_path: Path) -> None:
    done = python(LEAVING, str(tmp_path))
    assert sorted(done.stdout.splitlines()) == ["[0, 1, 143]", "done False", "error False", "signal False"], done.stderr


ONE_OF_TWO = """
import os, socket, sys
from pathlib import Path
from support.training import tiny
from karat.train import engine
from karat.train.classify import Classification
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
pids = []
for rank in "01":
    if not (pid := os.fork()):  # torch is imported once; the parent runs no kernel, so a fork is safe
        break
    pids.append(pid)
else:
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    raise SystemExit
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
values = {"train_crop_mode": "rrc", "data_fraction": 1.0, "batch_size": 2, "epochs": 1, "recovery_interval": 1}
engine.Trainer(Classification(), tiny(Path(sys.argv[2]), data=sys.argv[1], **values)).fit()
"""


@pytest.mark.slow
def test_what_one_of_two_processes_fails_at_ends_both(tmp_path: Path) -> None:
    """The other one must not be left waiting for a checkpoint that the first one can't make alone."""
    folder = images(tmp_path / "data")
    (folder / "train" / "class0" / "0.png").write_bytes(b"no image")
    done = python(ONE_OF_TWO, str(folder), str(tmp_path / "run"), timeout=300)
    assert done.stdout.strip() == "[1, 1]", done.stderr
    assert "0.png: cannot be decoded" in done.stderr
