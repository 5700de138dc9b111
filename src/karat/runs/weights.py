"""The door for weights from elsewhere: a run, a saved model, a file, shards or hub:NAME, and what is known of each.

Equal names and shapes don't make equal meaning: six numbers an edge are a Fourier series or a spline. So weights come
in with the configuration that they belong to, which a run or a saved model notes, or safetensors' metadata. A file in
such a folder has that folder's; where its digest is another than the one noted, no more than the configuration.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging
from timm import create_model as create_timm_model
from torch import Tensor, nn

from karat import runs
from karat.errors import brief, first_line
from karat.models.create import PREFIX, REGISTERED
from karat.models.kan.mlp import parse_mlp
from karat.models.kan.peers import DEEP_KAN, PEERS
from karat.operator.config import KArAtConfig
from karat.runs import checkpoint, files, saved
from karat.runs.classification import Settings
from karat.runs.model import build_model, load_run

HUB = "hub:"
ATTENTION, MLP, CLASSES = "attention", "mlp", "class_names"  # in safetensors' metadata


@dataclass(frozen=True)
class Given:
    """Weights by name, and what is known of the model that they are of.

    model: it, with these weights; None: only the weights are known. attention, mlp: as it was built; None: not known.
    mlp names KAN layers, see `mlp_of`. class_names: of its head, empty where they aren't known.
    """

    name: str
    weights: Mapping[str, Tensor]
    model: nn.Module | None = None
    attention: str | None = None
    mlp: str | None = None
    class_names: tuple[str, ...] = ()


def mlp_of(model: str, mlp: str) -> str:
    """What a model's MLPs are: a peer has them by its name, a deep KAN its settings.

    >>> mlp_of("vit_tiny_patch16_224", "kan"), mlp_of("kat_tiny_patch16_224", "mlp")
    ('kan', 'grkan(init=silu)')
    """
    if model.partition("(")[0] == DEEP_KAN:
        return model
    bare = model.split(".")[0]
    return PEERS[bare].mlp if bare in PEERS and mlp == saved.OWN_MLP else mlp


def open_weights(name: str, which: str = "last") -> Given:
    """What `name` names: a run's or saved model's folder, safetensors, one file or shards, or hub:NAME of timm's.

    which: "last", "best" or "ema" of a run. torch's random state is left as it was. Raises ValueError for a source
    that is missing, damaged, was tampered with or is a pickle.
    """
    with torch.random.fork_rng(devices=()):
        if name.startswith(HUB):
            return _of_hub(name)
        path = Path(name)
        if path.is_dir():
            return _of_folder(name, path, which)
        if path.is_file():
            return _of_file(name, path)
    raise ValueError(
        f"{name}: no such run or file; give a folder of a run or saved model, a safetensors file or {HUB}NAME"
    )


def _of_hub(name: str) -> Given:
    bare = name.removeprefix(HUB)
    model, base = pretrained(bare), bare.split(".")[0]
    attention = REGISTERED.get(base.removeprefix(PREFIX), "softmax") if base.startswith(PREFIX) else "softmax"
    return Given(name, model.state_dict(), model, attention, mlp_of(bare, saved.OWN_MLP))


def pretrained(name: str, **arguments: Any) -> nn.Module:
    """timm's model with its pretrained weights; ValueError, in a line, where they can't be had."""
    try:
        with quiet_hub():
            return create_timm_model(name, pretrained=True, **arguments)
    except Exception as error:  # timm raises RuntimeError, the Hub's client its own kinds
        raise ValueError(
            f"{HUB}{name} cannot be loaded ({first_line(error)}); is the name timm's and a network there?"
        ) from error


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Within, what can't be reached is one error, and not also a warning for each attempt."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _of_folder(name: str, folder: Path, which: str) -> Given:
    if saved.is_saved(folder):
        return _saved(name, *saved.read(folder), folder)
    if runs.is_run(folder) and runs.holds_settings(folder):
        return _run(name, load_run(folder, which), folder)
    for file in (folder / saved.WEIGHTS, folder / (saved.WEIGHTS + files.INDEX)):
        if file.is_file():
            return _of_file(name, file)
    pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in files.PICKLES), None)
    if pickled is not None:
        files.refuse_pickle(pickled)
    raise ValueError(
        f"{name} is no run's and no saved model's folder: it has no {runs.CONFIG} of karat's and no {saved.WEIGHTS}"
    )


def _run(name: str, model: nn.Module, folder: Path) -> Given:
    settings, facts = runs.read_config(folder)
    classes = tuple(map(str, facts.get(CLASSES, ())))
    mlp = mlp_of(settings.model, settings.mlp)
    return Given(name, model.state_dict(), model, settings.attention, mlp, classes)


def _saved(name: str, config: saved.ModelConfig, weights: Mapping[str, Tensor], folder: Path) -> Given:
    try:
        model = saved.build(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / saved.CONFIG} describes no model: {error}") from None
    saved.load(model, weights, str(folder / saved.WEIGHTS))
    mlp = mlp_of(config.model, config.mlp)
    return Given(name, model.eval().state_dict(), model, config.attention, mlp, config.class_names)


def _of_file(name: str, path: Path) -> Given:
    """A file's weights, and of what is noted in it or beside it."""
    path, told = path.resolve(), dict[str, Any]()
    weights, notes = files.read_tensors(path), files.read_metadata(path)
    if saved.is_saved(path.parent) and path.name == saved.WEIGHTS:
        config, digest = saved.read_config(path.parent)
        if files.digest(path) == digest:
            return _saved(name, config, weights, path.parent)
        told = {ATTENTION: config.attention, MLP: mlp_of(config.model, config.mlp)}  # changed since: no more than that
    for folder in list(path.parents)[:3]:  # RUN, RUN/checkpoints/step-1, RUN/trajectory
        if runs.is_run(folder) and runs.holds_settings(folder) and runs.task_of(folder) == Settings.task:
            if _vouched(path, folder):
                return _of_run_file(name, path, folder, weights)
            if path.name in (checkpoint.MODEL, checkpoint.EMA):
                settings, _ = runs.read_config(folder)
                told = {ATTENTION: settings.attention, MLP: mlp_of(settings.model, settings.mlp)}
            break
    return Given(name, weights, **(_noted(path, notes) if ATTENTION in notes else told))


def _noted(path: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says of its model. Raises ValueError for what can't be."""
    mlp = notes.get(MLP)
    try:
        KArAtConfig.parse(notes[ATTENTION])
        if mlp is not None and not mlp.startswith(DEEP_KAN):
            parse_mlp(mlp)
        classes = json.loads(notes.get(CLASSES, "[]"))
        if not isinstance(classes, list):
            raise ValueError(f"{CLASSES} is {brief(classes)}, no list of names")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that can't be karat's: {first_line(error)}; save it without") from None
    return {ATTENTION: notes[ATTENTION], MLP: mlp, CLASSES: tuple(map(str, classes))}


def _of_run_file(name: str, path: Path, folder: Path, weights: dict[str, Tensor]) -> Given:
    settings, facts = runs.read_config(folder)
    model = build_model(settings, facts["num_classes"], facts["in_chans"], folder)
    checkpoint.load_weights(model, weights, str(path))
    return _run(name, model, folder)


def _vouched(path: Path, folder: Path) -> bool:
    """Whether a run notes this very file: by its own digests or its checkpoint's."""
    if (path.parent / files.MANIFEST).is_file():
        return files.first_difference(path.parent) is None
    if path.parent == folder / runs.TRAJECTORY:
        return True
    noted = files.read_json(folder / runs.DIGESTS) if (folder / runs.DIGESTS).is_file() else {}
    return files.digest(path) in noted.get(path.name, [])
