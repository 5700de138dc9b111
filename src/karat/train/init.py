"""Fine-tuning's start: weights of another model, taken over as far as they fit, with an account of it.

The source is a run's folder, a safetensors file or `hub:NAME` (timm's pretrained weights). A token grid of another
size is resampled first (position embeddings and operators, SPEC §9); a head for other classes starts fresh; operators
start fresh where the source has none or others, as in softmax -> KArAt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timm import create_model as create_timm_model
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from karat import runs
from karat.errors import first_line
from karat.models.kan.mlp import refuse_other_form
from karat.models.resample import resample_tokens
from karat.operator.config import KArAtConfig
from karat.operator.operator import factors_of, with_factors, without_torn_layers
from karat.runs import files
from karat.runs.model import load_run
from karat.runs.settings import RunSettings
from karat.train.optim import operator_parameters

LOADED, RESIZED, FRESH, DROPPED = "loaded", "resized", "fresh", "dropped"


@dataclass(frozen=True)
class Transplanted:
    """What became of one part of a model: loaded, resized, fresh (the model's own) or dropped (the source's)."""

    part: str
    fate: str
    tensors: int
    parameters: int


def table(fates: list[Transplanted], source: str) -> Table:
    """The account as a table for the terminal."""
    drawn = Table(title=f"weights from {source}", title_justify="left")
    for column in ("part", "fate"):
        drawn.add_column(column)
    for column in ("tensors", "parameters"):
        drawn.add_column(column, justify="right")
    for fate in fates:
        drawn.add_row(fate.part, fate.fate, str(fate.tensors), f"{fate.parameters:,}")
    return drawn


def load_init(model: nn.Module, settings: RunSettings) -> list[Transplanted]:
    """Give `model` the weights that `settings.init` names, as far as they fit; returns what became of each part.

    Raises ValueError when the source is missing, was tampered with, or shares no weight with the model.
    """
    assert settings.init is not None
    weights, same_operator, resized = read_source(settings.init, model, settings)
    return transplant(model, weights, settings.init, same_operator=same_operator, resized=resized)


Source = tuple[dict[str, Tensor], bool, frozenset[str]]


def read_source(source: str, model: nn.Module, settings: RunSettings) -> Source:
    """The source's weights on the model's token grid, whether its operators mean the same as the model's, and the
    names of the weights that were resized on the way."""
    side = _side(model)
    whole = read_model(source, settings)
    if whole is not None:
        return _on_grid(*whole, side)
    return files.read_tensors(Path(source).expanduser()), True, frozenset()


def read_model(source: str, settings: RunSettings) -> tuple[nn.Module, bool] | None:
    """The model that a run or hub:NAME holds, and whether its operators mean the same; None for a file of weights.

    Raises ValueError when the source is missing, can't be loaded or was tampered with.
    """
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        try:
            return create_timm_model(name, pretrained=True), True
        except Exception as error:  # timm raises RuntimeError, the Hub's client its own kinds
            raise ValueError(
                f"--init {source}: cannot be loaded ({first_line(error)}); is the name timm's and a network there?"
            ) from error
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_run(path, settings)
    if not path.is_file():
        raise ValueError(f"--init {source}: no such run or file; give a run's folder, a safetensors file or hub:NAME")
    return None


def _read_run(folder: Path, settings: RunSettings) -> tuple[nn.Module, bool]:
    theirs, _ = runs.read_config(folder)
    return load_run(folder), same_operators(settings.attention, theirs.attention)


def same_operators(mine: str, other: str) -> bool:
    """Whether the operators of two attentions mean the same, so that one's weights may become the other's."""
    ours, theirs = KArAtConfig.parse(mine), KArAtConfig.parse(other)
    meaning = ("basis", "order", "base", "sharing", "position")
    return all(getattr(ours, name) == getattr(theirs, name) for name in meaning)


def _side(model: nn.Module) -> int | None:
    """The side of the images that a model takes, where it says so."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else int(size[0])


def _on_grid(source: nn.Module, same_operator: bool, side: int | None) -> Source:
    before = {name: tensor.shape for name, tensor in source.state_dict().items()}
    if side is not None and _side(source) not in (None, side):
        resample_tokens(source, img_size=side)
    weights = source.state_dict()
    resized = frozenset(name for name, tensor in weights.items() if tensor.shape != before.get(name))
    return weights, same_operator, resized


def transplant(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    same_operator: bool = True,
    resized: Collection[str] = (),
) -> list[Transplanted]:
    """Copy into `model` every weight of the same name and shape; position embeddings and input channels are adapted.

    `resized` names weights that were carried to the model's size before.
    """
    try:
        refuse_other_form(model, weights)
    except ValueError as error:
        raise ValueError(f"--init {source}: {error}") from None
    own, weights = model.state_dict(), with_factors(model, weights)
    operators, factors = set(operator_parameters(model)), factors_of(model)
    counts: dict[tuple[str, str], list[int]] = {}

    def note(name: str, fate: str, tensor: Tensor) -> None:
        if name in factors:  # they go with their parameters
            return
        entry = counts.setdefault((_part(name, model, operators), fate), [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel()

    fitting: dict[str, Tensor] = {}
    for name, target in own.items():
        found = weights.get(name)
        if found is not None and not (name in operators and not same_operator):
            adapted = adapt(name, found, target, model)
            if adapted is not None:
                fitting[name] = adapted
    taken = without_torn_layers(model, fitting, weights)
    for name, target in own.items():
        if name not in taken:
            note(name, FRESH, target)
        else:
            changed = name in resized or taken[name].shape != weights[name].shape
            note(name, RESIZED if changed else LOADED, target)
    for name, tensor in weights.items():
        if name not in taken:
            note(name, DROPPED, tensor)
    if not taken:
        first = next(iter(weights), "nothing")
        raise ValueError(f"--init {source}: it shares no weight with the model (it has {first!r}, …)")
    model.load_state_dict({**own, **taken})
    return [Transplanted(part, fate, *numbers) for (part, fate), numbers in sorted(counts.items())]


def adapt(name: str, found: Tensor, target: Tensor, model: nn.Module) -> Tensor | None:
    """`found` in the shape of `target`, or None where it can't be brought there."""
    if found.shape == target.shape:
        return found
    if name == "pos_embed" and found.ndim == 3 and found.shape[2] == target.shape[2]:
        prefix: Any = getattr(model, "num_prefix_tokens", 1)
        patches: Any = model.patch_embed
        try:
            return resample_abs_pos_embed(found, list(patches.grid_size), num_prefix_tokens=prefix)
        except (RuntimeError, AssertionError):  # no square number of tokens
            return None
    if name.startswith("patch_embed") and found.ndim == 4 and found.shape[1] == 1:
        found = found.repeat(1, 3, 1, 1) / 3  # grey pixels are colours of three equal parts
        if found.shape == target.shape:
            return found
    if name.startswith("patch_embed") and found.ndim == 4 and found.shape[2:] == target.shape[2:]:
        try:
            return (
                torch.as_tensor(adapt_input_conv(target.shape[1], found)) if found.shape[0] == target.shape[0] else None
            )
        except NotImplementedError:
            return None
    return None


def _part(name: str, model: nn.Module, operators: set[str]) -> str:
    if name in operators or ".operator." in name:
        return "operators"
    config: Any = getattr(model, "pretrained_cfg", {})
    heads = config.get("classifier", "head")
    if name.startswith((heads,) if isinstance(heads, str) else tuple(heads)):
        return "head"
    pieces = name.split(".")
    return f"{pieces[0]}: {pieces[2]}" if pieces[0] == "blocks" and len(pieces) > 2 else pieces[0]


def as_json(fates: list[Transplanted]) -> list[dict[str, Any]]:
    """The account as plain values."""
    return [asdict(fate) for fate in fates]
