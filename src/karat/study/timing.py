"""The time of a training step of each variant, side by side in one process, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from karat import runs
from karat.runs import files
from karat.runs.classification import Settings
from karat.runs.model import build_model, input_size
from karat.study.bench.step import fuse_softmax, step_of
from karat.study.bench.timing import alternate, environment
from karat.study.plan import Plan, Variant, with_epochs
from karat.train import randomness
from karat.train.build import checkpoint_gradients

TIMES = "times.json"
DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Times = Mapping[str, Mapping[str, float]]  # seconds of a step, by variant and precision

_OF_A_STEP = (
    *("model", "attention", "teacher"),
    *("grad_accum_steps", "grad_checkpointing", "compile", "channels_last"),
)


def measure_times(plan: Plan, *, only: Collection[str] = (), rounds: int = 9) -> Times:
    """Time a step of each variant, alternating, in float32 and in its own precision; kept in the study's times.json.

    only: the names of the variants to time, where it isn't all; what times.json holds of others stays.

    A step is forward, loss and backward of a fixed random batch of the variant's size, or of grad_accum_steps batches,
    and AdamW's update, compiled, with activations recomputed and channels last where the variant's settings say so.
    Loading and augmenting images are left out. Variants that take the same step are timed once. Softmax attention of
    timm's is timed fused and in plain operations, and the faster of the two counts. Seconds, medians.

    Raises ValueError, before anything is timed, for kept times of another machine or of other settings.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give 1 or more")
    device = "cuda" if torch.cuda.is_available() and plan.variants[0].settings.device == "auto" else "cpu"
    num_classes, in_chans = _sizes(plan)
    where = {"environment": environment(), "device": device}
    kept = _kept(plan, plan.only(only), where)
    plan = plan.only(only)
    steps: dict[str, Callable[[], object]] = {}
    ways: dict[str, dict[str, str]] = {}  # of each step, the names of its timings by way
    names: dict[tuple[str, str], str] = {}
    for variant in plan.variants:
        for kind in dict.fromkeys(["float32", str(variant.settings.amp_dtype)]):
            key = repr((step_settings(variant.settings), kind))
            names[variant.name, kind] = key
            if key not in ways:
                found = _steps(variant.settings, num_classes, in_chans, device, DTYPES[kind])
                ways[key] = {way: f"{key} {way}" for way in found}
                steps |= {f"{key} {way}": step for way, step in found.items()}
    measured = alternate(steps, rounds)
    rows: dict[str, Any] = {v.name: {"settings": step_settings(v.settings), "seconds": {}} for v in plan.variants}
    for (name, kind), key in names.items():
        way, timing = min(((way, measured[step]) for way, step in ways[key].items()), key=lambda one: one[1].median)
        rows[name]["seconds"][kind] = {"way": way, "rounds": rounds, **vars(timing)}
    plan.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(plan.folder / TIMES, {**where, "rows": kept | rows})
    return _medians(rows)


def read_times(plan: Plan) -> Times:
    """The medians that the study's folder holds of the plan's variants; none where it was not timed.

    Raises ValueError where a variant was timed under other settings than it has now.
    """
    rows = _read(plan.folder).get("rows", {})
    known = {variant.name: rows[variant.name] for variant in plan.variants if variant.name in rows}
    for name, row in known.items():
        before, now = row["settings"], step_settings(plan.variant(name).settings)
        for setting in dict.fromkeys([*before, *now]):
            if before.get(setting) != now.get(setting):
                raise ValueError(
                    f"variant {name!r} was timed under other settings: {setting} was {before.get(setting)!r} and is "
                    f"now {now.get(setting)!r}; time it again with --time, or give another --output"
                )
    return _medians(known)


def _medians(rows: Mapping[str, Any]) -> Times:
    return {
        name: {kind: float(value["median"]) for kind, value in row["seconds"].items()} for name, row in rows.items()
    }


def _read(folder: Path) -> dict[str, Any]:
    path = folder / TIMES
    return files.read_json(path) if path.is_file() else {}


def _kept(plan: Plan, chosen: Plan, where: Mapping[str, Any]) -> dict[str, Any]:
    """What times.json holds of the plan's other variants than the chosen ones."""
    new = {variant.name for variant in chosen.variants}
    rest = replace(plan, variants=tuple(variant for variant in plan.variants if variant.name not in new))
    names = read_times(rest)
    found = _read(plan.folder)
    for place, now in where.items() if names else ():
        if found[place] != now:
            raise ValueError(
                f"{plan.folder / TIMES} was measured elsewhere: {place} was {found[place]} and is now {now}; time all "
                "variants, without names"
            )
    return {name: found["rows"][name] for name in names}


def settle(plan: Plan, times: Times) -> Plan:
    """The plan with the epochs of rows that train as long as another worked out, where both were timed."""
    return replace(plan, variants=tuple(_settled(plan, variant, times) for variant in plan.variants))


def _settled(plan: Plan, variant: Variant, times: Times) -> Variant:
    if not variant.waits or variant.equal_time_to is None:
        return variant
    other = plan.variant(variant.equal_time_to)
    if other.waits:
        raise ValueError(f"variant {variant.name!r}: equal_time_to {other.name!r}, which has no epochs of its own")
    ratio = time_ratio(variant, other, times)
    if ratio is None:
        return variant
    # whole epochs, never less time than the other row has; a quotient of 8.000000001 is 8
    return with_epochs(variant, math.ceil(round(variant.settings.recipe.epochs / ratio, 6)))


def time_ratio(variant: Variant, other: Variant, times: Times) -> float | None:
    """A variant's training time over another's, by measured step times; None where one was not timed."""
    ours, theirs = _training_time(variant, times), _training_time(other, times)
    return None if ours is None or theirs is None else ours / theirs


def _training_time(variant: Variant, times: Times) -> float | None:
    """Steps' time of all epochs, up to a factor that all variants share."""
    s = variant.settings
    step = times.get(variant.name, {}).get(s.amp_dtype)
    images = s.recipe.batch_size * s.grad_accum_steps
    return None if step is None else step * s.recipe.epochs * s.data_fraction / images


def _sizes(plan: Plan) -> tuple[int, int]:
    """Classes and channels of the data, as a run has them; 10 and 3 before there is one."""
    for job in plan.jobs():
        if runs.is_run(job.folder):
            _, facts = runs.read_config(job.folder)
            return int(facts["num_classes"]), int(facts["in_chans"])
    return plan.variants[0].settings.num_classes or 10, 3


def step_settings(settings: Settings) -> dict[str, Any]:
    """What the time of a step depends on besides its precision, as JSON has it."""
    recipe = settings.recipe
    own = {name: getattr(settings, name) for name in _OF_A_STEP}
    of_recipe = {name: getattr(recipe, name) for name in ("batch_size", "drop", "drop_path")}
    return own | settings.model_kwargs() | of_recipe


def _steps(
    settings: Settings, num_classes: int, in_chans: int, device: str, amp: torch.dtype | None
) -> dict[str, Callable[[], float]]:
    """The step in each way that there is of taking it: two where timm's softmax attention is in the model."""
    with randomness.aside(0):
        model = build_model(settings, num_classes, in_chans)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    if settings.grad_checkpointing:
        checkpoint_gradients(model, settings.model)
    if settings.compile:
        model.compile()
    step = step_of(
        model,
        settings.recipe.batch_size,
        device=device,
        amp=amp,
        side=settings.img_size or input_size(settings.model),
        channels=in_chans,
        batches=settings.grad_accum_steps,
        memory_format=memory_format,
    )

    def taken(fused: bool) -> float:
        fuse_softmax(model, fused)
        return step()

    if not fuse_softmax(model, True):
        return {"own": step}

    return {"fused softmax": partial(taken, True), "plain softmax": partial(taken, False)}
