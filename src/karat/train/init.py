"""Fine-tuning's start: weights of another model, taken over as far as they fit, with an account of it.

The source comes through `karat.runs.weights`; what lies on another token grid is resampled (`karat.models.fit`).
A head for other classes starts fresh. So does whatever has another meaning, its shape equal or not: operators where the
source has none or others, KAN layers of other settings, heads that are cut differently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from karat.data.labels import some
from karat.models.fit import check_numbers, fit, places_of_weights, same_rates, unwrapped
from karat.models.kan import FourierLinear, RBFLinear, SplineLinear, parse_mlp
from karat.models.kan.mlp import PLAIN, refuse_other_form
from karat.models.kan.peers import DEEP_KAN
from karat.models.kan.rational import Rational
from karat.operator.config import KArAtConfig
from karat.operator.operator import factors_of, karat_operators, with_factors, without_torn_layers
from karat.runs.classification import Settings
from karat.runs.settings import RunSettings
from karat.runs.weights import Given, mlp_of, open_weights
from karat.train.optim import operator_parameters

KAN_LAYERS = (SplineLinear, FourierLinear, RBFLinear, Rational)
OPERATORS, HEAD = "operators", "head"
LOADED, RESIZED, FRESH, DROPPED = "loaded", "resized", "fresh", "dropped"


@dataclass(frozen=True)
class Transplanted:
    """What became of one part of a model: loaded, resized, fresh (the model's own) or dropped (the source's)."""

    part: str
    fate: str
    tensors: int
    parameters: int
    why: str = ""


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


def account(fates: list[Transplanted], source: str) -> str:
    """The account in a line, and a line for each reason why something isn't the source's."""
    said = []
    for fate in (LOADED, RESIZED, FRESH, DROPPED):
        mine = [entry for entry in fates if entry.fate == fate]
        named = "" if fate == LOADED or not mine else f" ({', '.join(entry.part for entry in mine)})"
        said.append(f"{sum(entry.tensors for entry in mine)} {fate}{named}")
    reasons = {entry.why: entry.part for entry in fates if entry.why}
    return "\n".join([f"tensors of {source}: {', '.join(said)}", *(f"{part}: {why}" for why, part in reasons.items())])


def load_init(model: nn.Module, settings: Settings, class_names: Sequence[str] = ()) -> list[Transplanted]:
    """Give `model` the weights that `settings.init` names, as far as they fit; returns what became of each part.

    class_names: of the model's head, empty where they aren't known.

    Raises ValueError when the source is missing, was tampered with, or shares no weight with the model.
    """
    given = read_source(settings, model.state_dict())
    other = other_meaning(model, given, settings.attention, mlp_of(settings.model, settings.mlp))
    if why := other_classes(given, class_names):
        operators = set(operator_parameters(model))
        other |= {name: why for name in model.state_dict() if _part(name, model, operators) == HEAD}
    fates = transplant(model, given.weights, given.name, other=other, origin=given.model)
    if class_names and not given.class_names:
        why = f"nothing in or beside {given.name} says of which classes it is: taken as the data's"
        fates = [replace(f, why=f.why or why) if f.part == HEAD and f.fate == LOADED else f for f in fates]
    return assumed(fates, given, settings.attention)


def other_classes(given: Given, class_names: Sequence[str]) -> str:
    """Why a head can't be taken over, its size equal or not; nothing where both have the same classes, or one's aren't
    known."""
    if not (given.class_names and class_names) or list(given.class_names) == list(class_names):
        return ""
    return f"{given.name} has the classes {some(given.class_names)}, the data {some(class_names)}"


def assumed(fates: list[Transplanted], given: Given, attention: str) -> list[Transplanted]:
    """The account, saying where operators were taken as the model's because nothing tells whose they are."""
    if given.attention is not None:
        return fates
    why = f"nothing in or beside {given.name} says of which attention they are: taken as the model's, {attention}"
    taken = (LOADED, RESIZED)
    return [replace(f, why=f.why or why) if f.part == OPERATORS and f.fate in taken else f for f in fates]


def read_source(settings: RunSettings, own: Mapping[str, Tensor]) -> Given:
    """What --init names, for a model with the weights `own`: under its names where they lie below others.

    Raises ValueError as `open_weights` does, and for weights that are quantised or not finite.
    """
    try:
        given = open_weights(str(settings.init))
    except ValueError as error:
        raise ValueError(f"--init {error}") from error
    weights = unwrapped(given.weights, own.keys())
    check_numbers(weights, own, f"--init {given.name}: ")
    return replace(given, weights=weights)


def other_meaning(model: nn.Module, given: Given, attention: str, mlp: str = PLAIN) -> dict[str, str]:
    """The model's weights that the source's can't become whatever their shapes, and why.

    attention, mlp: the model's. Where nothing is known of the source, an operator's factors tell most others.
    """
    mine, other = KArAtConfig.parse(attention), dict[str, str]()
    theirs = None if given.attention is None else KArAtConfig.parse(given.attention)
    before = {} if given.model is None else _heads(given.model)
    places = places_of_weights(given.weights)
    for name, op in karat_operators(model).items():
        if theirs is None:
            found = {key: given.weights[f"{name}.{key}"] for key in op.state_dict() if f"{name}.{key}" in given.weights}
            sizes = {op.num_tokens} if places is None else {op.num_tokens, places.grid.num_tokens}
            if any(same_rates(op, found, size) for size in sizes):
                continue
            why = f"{given.name} has operators of another attention than {mine}"
        elif not mine.same_functions(theirs, op.num_heads):
            why = f"{given.name} has {theirs}, the model {mine}"
        else:
            continue
        other |= dict.fromkeys((f"{name}.{key}" for key in op.state_dict()), why)
    for name, heads in _heads(model).items():
        if before.get(name, heads) != heads:
            why = f"{given.name} has {before[name]} heads, the model {heads}"
            other |= dict.fromkeys((f"{name}.{key}" for key in model.get_submodule(name).state_dict()), why)
    if given.mlp is not None and _functions(given.mlp) != _functions(mlp):
        why = f"{given.name} has {given.mlp}, the model {mlp}"
        for name, module in model.named_modules():
            if isinstance(module, KAN_LAYERS):
                other |= dict.fromkeys((f"{name}.{key}" for key in module.state_dict()), why)
    return other


def _heads(model: nn.Module) -> dict[str, int]:
    """How many heads each attention of a model has, by name."""
    found = {name: module.num_heads for name, module in model.named_modules() if name and hasattr(module, "num_heads")}
    for name in karat_operators(model):
        found.pop(name, None)
    inner = {name.rpartition(".")[0] for name in found}  # Swin's blocks say it too
    return {name: int(heads) for name, heads in found.items() if name not in inner}


def _functions(mlp: str) -> object:
    """What the numbers of KAN layers mean: all settings but where functions start."""
    kind = None if mlp.startswith(DEEP_KAN) else parse_mlp(mlp)
    return mlp if kind is None else (kind.name, {**asdict(kind), "init": None})


def transplant(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    other: Mapping[str, str] = MappingProxyType({}),
    origin: nn.Module | None = None,
    resized: Collection[str] = (),
) -> list[Transplanted]:
    """Copy into `model` the weights that `karat.models.fit` brings to its sizes, layers of functions whole or not.

    other: names that aren't to be taken, and why. origin: the model that the weights are of. `resized` names weights
    that were carried to the model's size before.
    """
    try:
        refuse_other_form(model, weights)
    except ValueError as error:
        raise ValueError(f"--init {source}: {error}") from None
    own, weights = model.state_dict(), with_factors(model, weights)
    operators, factors = set(operator_parameters(model)), factors_of(model)
    counts: dict[tuple[str, str], list[int]] = {}
    reasons: dict[tuple[str, str], str] = {}

    def note(name: str, fate: str, tensor: Tensor) -> None:
        if name in factors:  # they go with their parameters
            return
        key = _part(name, model, operators), fate
        entry = counts.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel()
        if name in other:
            reasons.setdefault(key, other[name])

    fitting, changed = fit(model, {name: x for name, x in weights.items() if name not in other}, origin)
    taken = _whole_layers(model, without_torn_layers(model, fitting, weights))
    for name, target in own.items():
        if name not in taken:
            note(name, FRESH, target)
        else:
            note(name, RESIZED if name in resized or name in changed else LOADED, target)
    for name, tensor in weights.items():
        if name not in taken:
            note(name, DROPPED, tensor)
    if not taken:
        first = next(iter(weights), "nothing")
        raise ValueError(
            f"--init {source}: it shares no weight with the model (it has {first!r}, the model {next(iter(own))!r}): "
            "give its tensors the model's names"
        )
    model.load_state_dict({**own, **taken})
    return [
        Transplanted(part, fate, tensors, parameters, reasons.get((part, fate), ""))
        for (part, fate), (tensors, parameters) in sorted(counts.items())
    ]


def _whole_layers(model: nn.Module, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the KAN layers of which a part would be left: names of another kind's may be among theirs."""
    layers = [name for name, module in model.named_modules() if isinstance(module, KAN_LAYERS)]
    torn = {
        name
        for layer in layers
        if not {f"{layer}.{key}" for key in model.get_submodule(layer).state_dict()} <= set(taken)
        for name in taken
        if name.startswith(f"{layer}.")
    }
    return {name: tensor for name, tensor in taken.items() if name not in torn}


def _part(name: str, model: nn.Module, operators: set[str]) -> str:
    if name in operators or ".operator." in name:
        return OPERATORS
    config: Any = getattr(model, "pretrained_cfg", {})
    heads = config.get("classifier", "head")
    if name.startswith((heads,) if isinstance(heads, str) else tuple(heads)):
        return HEAD
    pieces = name.split(".")
    return f"{pieces[0]}: {pieces[2]}" if pieces[0] == "blocks" and len(pieces) > 2 else pieces[0]


def as_json(fates: list[Transplanted]) -> list[dict[str, Any]]:
    """The account as plain values."""
    return [asdict(fate) for fate in fates]
