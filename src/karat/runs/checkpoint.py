"""Full-state checkpoints of a run: atomic, checked by digest, the last K kept and the best.

A checkpoint is a folder `RUN/checkpoints/step-00000120` of model.safetensors, optimizer.safetensors, ema.safetensors
(with EMA), state.json (position, counters, random states, history) and manifest.json (sizes and SHA-256). It is
written under a hidden name and renamed when all of it is on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat.operator.operator import with_factors
from karat.runs import files

FOLDER = "checkpoints"
MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
COUNTER = "group.step"


@dataclass
class Checkpoint:
    """Everything that a run needs to go on: named tensors, and `state`, which is plain JSON."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def listed(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((run / FOLDER).glob("step-*"))


def write(run: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and drop those beyond the last `keep` and the best; OSError when the disk refuses."""
    folder = run / FOLDER
    target = folder / name_of(checkpoint.state["step"])
    draft = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        draft.mkdir()
        files.write_tensors(draft / MODEL, checkpoint.model)
        files.write_tensors(draft / OPTIMIZER, checkpoint.optimizer)
        if checkpoint.ema is not None:
            files.write_tensors(draft / EMA, checkpoint.ema)
        files.write_json(draft / STATE, checkpoint.state)
        files.write_manifest(draft)
        files.sync(draft)
        aside = folder / f".{target.name}.old.tmp"
        if target.exists():  # the same step again, of an epoch that was ended since or a run resumed from before
            target.rename(aside)  # removing it takes longer than no checkpoint of the step may be there
        draft.rename(target)
        files.sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
        for later in [path for path in listed(run) if path.name > target.name]:
            shutil.rmtree(later, ignore_errors=True)  # refused when the run resumed from before them
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        last = listed(run)
        kept = f"{last[-1]} is whole" if last else "nothing was saved before"
        raise OSError(
            f"the checkpoint at step {checkpoint.state['step']} could not be saved ({error}); {kept}"
        ) from error
    prune(run, keep=keep, best=checkpoint.state.get("best", {}).get("checkpoint"))
    return target


def prune(run: Path, *, keep: int, best: str | None) -> None:
    """Remove all but the last `keep` checkpoints and the one named `best`."""
    for path in listed(run)[:-keep]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Read one checkpoint folder; ValueError names the first difference from its manifest."""
    difference = files.first_difference(path)
    if difference is not None:
        raise ValueError(f"checkpoint {path.name} is refused: {difference}")
    return Checkpoint(
        model=files.read_tensors(path / MODEL),
        optimizer=files.read_tensors(path / OPTIMIZER),
        ema=files.read_tensors(path / EMA) if (path / EMA).exists() else None,
        state=files.read_json(path / STATE),
    )


def newest(run: Path) -> tuple[Checkpoint, list[str]] | None:
    """The newest whole checkpoint and what was wrong with those after it; None where a run has none yet.

    Raises ValueError when there are checkpoints and none is whole.
    """
    refused: list[str] = []
    for path in reversed(listed(run)):
        try:
            return read(path), refused
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError(f"no checkpoint of {run} is whole: {refused[0]}")
    return None


def pack_optimizer(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `parameter/entry`. Raises ValueError for state that is no tensor."""
    packed: dict[str, Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                kind = type(optimizer).__name__
                raise ValueError(f"{kind} keeps {key!r} as {type(value).__name__}: it can't be saved as safetensors")
            packed[f"{names[parameter]}/{key}"] = value  # type: ignore[index]  # the keys are parameters
    return packed | pack_counters(optimizer.param_groups, names)


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], packed: dict[str, Tensor], updates: int = 0
) -> None:
    """Give an optimiser the state that `pack_optimizer` took; ValueError names the first entry that doesn't fit.

    updates: how many there were, for groups whose count an earlier version didn't save.
    """
    unpack_counters(optimizer.param_groups, packed, updates, names)
    parameters = {name: parameter for parameter, name in names.items()}
    for full_name, value in packed.items():
        name, key = full_name.rsplit("/", 1)
        if key == COUNTER:
            continue
        if name not in parameters:
            raise ValueError(f"the optimiser's file has state for {name!r}, which the model does not have")
        parameter = parameters[name]
        if value.shape not in (parameter.shape, torch.Size([])):
            shapes = f"{tuple(value.shape)} in the file, {tuple(parameter.shape)} in the model"
            raise ValueError(f"the optimiser's {key!r} of {name!r} is {shapes}")
        # torch keeps a step counter on the CPU, moments beside their parameter
        device = torch.device("cpu") if value.ndim == 0 and key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(device)


def pack_counters(groups: list[dict[str, Any]], names: Mapping[Any, str] | None = None) -> dict[str, Tensor]:
    """The steps that some optimisers count for a whole group, beside its first parameter's name."""
    firsts = [(group["params"][0], group) for group in groups if "step" in group]
    return {f"{first if names is None else names[first]}/{COUNTER}": torch.as_tensor(g["step"]) for first, g in firsts}


def unpack_counters(
    groups: list[dict[str, Any]], packed: Mapping[str, Tensor], updates: int, names: Mapping[Any, str] | None = None
) -> None:
    """Give groups the steps that `pack_counters` took; `updates` where an earlier version took none."""
    for group in groups:
        first = group["params"][0]
        found = packed.get(f"{first if names is None else names[first]}/{COUNTER}")
        if found is not None:  # some count in Python's whole numbers
            group["step"] = found.clone() if found.is_floating_point() else int(found)
        elif "step" in group:
            group["step"] = group["step"] * 0 + updates


def first_difference(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What differs first between a model's weights and others by name and shape, in words; None where nothing does."""
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name!r} is missing"
        if found[name].shape != tensor.shape:
            return f"{name!r} is {tuple(found[name].shape)} there, {tuple(tensor.shape)} in the model"
    extra = next((name for name in found if name not in wanted), None)
    return None if extra is None else f"{extra!r} has no place in the model"


def check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where what was found in `source` isn't what a model wants, naming the first difference."""
    if (difference := first_difference(wanted, found)) is not None:
        raise ValueError(f"{source} does not fit the model: {difference}")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load named weights exactly: same names and shapes; ValueError names the first difference."""
    weights = with_factors(model, weights)
    check_fit(model.state_dict(), weights, source)
    model.load_state_dict(weights)
