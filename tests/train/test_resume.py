"""A run that is cut off at any moment and resumed ends as one that never was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from karat import runs
from karat.runs import checkpoint, files
from karat.runs.optimisation import Optimisation
from karat.train.classify import Classification, train
from karat.train.engine import Trainer
from karat.train.optim import create_optimizer
from support.interrupted import CutOff, Doomed
from support.processes import python
from support.training import NOISY, outcome, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The outcome of a run that nothing disturbs, with a checkpoint every third update."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(folder, attention="g3b", recovery_interval=3, grad_accum_steps=2, **NOISY))
    return outcome(folder)


@pytest.mark.parametrize("lives", [2, 4, 7, 12])
def test_cut_off_after_any_update_and_resumed_ends_bit_equal(tmp_path: Path, whole: tuple, lives: int) -> None:
    settings = {"attention": "g3b", "recovery_interval": 3, "grad_accum_steps": 2, **NOISY}
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = lives
    with pytest.raises(CutOff):
        doomed.fit()
    train(tiny(tmp_path / "run", resume="auto", **settings))
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("opt", ["lamb", "lambcw"])
def test_the_steps_that_an_optimiser_counts_for_whole_groups_go_on(tmp_path: Path, opt: str) -> None:
    settings = {"opt": opt, "epochs": 2, "recovery_interval": 3, "grad_accum_steps": 2}
    train(tiny(tmp_path / "whole", **settings))
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = 5
    with pytest.raises(CutOff):
        doomed.fit()
    train(tiny(tmp_path / "run", resume="auto", **settings))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_optimiser_saved_without_its_count_goes_on_from_the_updates() -> None:
    layers = [nn.Linear(3, 2) for _ in range(2)]
    names = [{parameter: name for name, parameter in layer.named_parameters()} for layer in layers]
    first, again = [create_optimizer(layer, Optimisation(opt="lamb"), 128) for layer in layers]
    for _ in range(3):
        layers[0](torch.ones(1, 3)).sum().backward()
        first.step()
    packed = checkpoint.pack_optimizer(first, names[0])
    earlier = {name: value for name, value in packed.items() if not name.endswith(checkpoint.COUNTER)}
    assert len(earlier) == len(packed) - len(first.param_groups)
    checkpoint.unpack_optimizer(again, names[1], earlier, updates=3)
    assert [group["step"] for group in again.param_groups] == [group["step"] for group in first.param_groups] == [3, 3]


def test_cut_off_again_and_again(tmp_path: Path, whole: tuple) -> None:
    settings = {"attention": "g3b", "recovery_interval": 3, "grad_accum_steps": 2, **NOISY}
    for _ in range(40):
        run = Doomed(Classification(), tiny(tmp_path / "run", resume="auto", **settings))
        run.lives = 4
        try:
            run.fit()
            break
        except CutOff:
            continue
    assert outcome(tmp_path / "run") == whole


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from support.training import NOISY, tiny
from karat.train.classify import train

def child(folder):
    pid = os.fork()  # all is imported; the parent runs no kernel, so a fork is safe
    if pid == 0:
        train(tiny(folder, attention="g3b", recovery_interval=3, grad_accum_steps=2, resume="auto", **NOISY))
        os._exit(0)
    return pid

root, draw = Path(sys.argv[1]), random.Random(0)
began = time.monotonic()
assert os.waitpid(child(root / "measured"), 0)[1] == 0
length = time.monotonic() - began
killed = finished = 0
while killed < 20:
    folder = root / f"run{finished}"
    pid = child(folder)
    time.sleep(draw.uniform(0.1, 0.9) * length)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    killed += status == signal.SIGKILL
    finished += status == 0
assert os.waitpid(child(root / f"run{finished}"), 0)[1] == 0
"""


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tmp_path: Path, whole: tuple) -> None:
    """The clock that kills knows nothing of steps: it strikes in updates, evaluation, or half-way in a file."""
    done = python(KILLER, str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr
    runs_made = sorted(tmp_path.glob("run*"))
    assert len(runs_made) >= 1
    for run in runs_made:
        assert outcome(run) == whole


def test_torn_checkpoint_is_noticed_and_the_one_before_used(tmp_path: Path, whole: tuple) -> None:
    settings = {"attention": "g3b", "recovery_interval": 3, "grad_accum_steps": 2, **NOISY}
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = 8
    with pytest.raises(CutOff):
        doomed.fit()
    last = checkpoint.listed(tmp_path / "run")[-1]
    data = (last / checkpoint.MODEL).read_bytes()
    (last / checkpoint.MODEL).write_bytes(data[: len(data) // 2])
    resumed = Trainer(Classification(), tiny(tmp_path / "run", resume="auto", **settings))
    assert len(resumed.notes) == 1
    assert last.name in resumed.notes[0]
    assert "manifest says" in resumed.notes[0]
    resumed.fit()
    assert outcome(tmp_path / "run") == whole


def test_no_whole_checkpoint_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=1))
    (path,) = checkpoint.listed(tmp_path / "run")
    with (path / checkpoint.OPTIMIZER).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=r"optimizer\.safetensors has SHA-256"):
        Trainer(Classification(), tiny(tmp_path / "run", epochs=1, resume="auto"))


def test_other_settings_are_refused_by_the_first_that_differs(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match=r"epochs was 1 and is now 2"):
        Trainer(Classification(), tiny(tmp_path / "run", epochs=2, resume="auto"))
    with pytest.raises(ValueError, match=r"attention was 'softmax' and is now 'g3b'"):
        Trainer(Classification(), tiny(tmp_path / "run", epochs=1, attention="g3b", resume="auto"))


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tiny(tmp_path / "run", epochs=1))
    before = outcome(tmp_path / "run")
    again = train(tiny(tmp_path / "run", epochs=1, resume="auto"))
    assert again["top1"] == first["top1"]
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize("start", [{}, {"attn_init": "mimetic"}], ids=str)
def test_resume_before_the_first_checkpoint_begins_again(tmp_path: Path, start: dict[str, str]) -> None:
    doomed = Doomed(Classification(), tiny(tmp_path / "run", epochs=1, **start))
    doomed.lives = 1
    with pytest.raises(CutOff):
        doomed.fit()
    resumed = Trainer(Classification(), tiny(tmp_path / "run", epochs=1, resume="auto", **start))
    assert "before its first checkpoint" in resumed.notes[0]
    resumed.fit()
    train(tiny(tmp_path / "fresh", epochs=1, **start))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "fresh")


def test_a_run_with_a_checkpoint_goes_on_without_what_it_started_from(tmp_path: Path) -> None:
    train(tiny(tmp_path / "source", epochs=1))
    settings = {"init": str(tmp_path / "source"), "recipe": "quick", "epochs": 2}
    train(tiny(tmp_path / "whole", **settings))
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = 12
    with pytest.raises(CutOff):
        doomed.fit()
    (tmp_path / "source").rename(tmp_path / "gone")
    train(tiny(tmp_path / "run", resume="auto", **settings))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_events_of_every_epoch_are_seen_after_a_resumption(tmp_path: Path) -> None:
    settings = {"track": ("tensorboard",), "epochs": 4}
    doomed = Doomed(Classification(), tiny(tmp_path / "run", **settings))
    doomed.lives = 20
    with pytest.raises(CutOff):
        doomed.fit()
    resumed = Trainer(Classification(), tiny(tmp_path / "run", resume="auto", **settings))
    assert resumed.progress.epoch == 2
    resumed.fit()
    events = EventAccumulator(str(tmp_path / "run" / runs.TENSORBOARD))
    events.Reload()
    assert [event.step for event in events.Scalars("top1")] == [1, 2, 3, 4]


def test_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", epochs=5, checkpoint_hist=1, lr=1e-9, warmup_lr=0.0, min_lr=0.0))
    summary = files.read_json(tmp_path / "run" / runs.SUMMARY)
    kept = [path.name for path in checkpoint.listed(tmp_path / "run")]
    assert summary["best"]["checkpoint"] in kept
    assert len(kept) == len({kept[-1], summary["best"]["checkpoint"]})
