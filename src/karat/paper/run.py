"""Running a published row: the same entry as its own command, smaller if wanted."""

from __future__ import annotations

import importlib
from pathlib import Path

from karat.paper.entries import Entry
from karat.paper.measured import FIGURES
from karat.paper.setup import command_line, command_words

# The function that a command of `Setup.program` ends in; imported when a row is run.
TRAINERS = {
    ("train",): "karat.train.commands:train",
    ("transfer",): "karat.train.commands:transfer",
    ("detect", "train"): "karat.detect.commands:train",
}


def run_options(entry: Entry, scale: float = 1.0, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The options of a row's command, --teacher among them.

    At a scale below 1 that fraction of the epochs (at least one) and images.

    extra: options that replace the row's own or come on top, e.g. {"--data": FOLDER}. Raises ValueError for a scale
    outside (0, 1], a row that can't be run, or a start that isn't there.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale}: give a fraction in (0, 1]")
    able, reason = entry.runnable
    if not able:
        raise ValueError(f"table{entry.table} row {entry.row} ({entry.model} {entry.variant}) can't be run: {reason}")
    options = entry.setup.options()
    if scale < 1:
        options["--epochs"] = str(max(1, round(scale * entry.setup.epochs)))
        options["--data-fraction"] = f"{scale:g}"
        options["--output"] += f"-scale{scale:g}"
    if "--teacher" in (extra or {}) and not entry.setup.teacher:
        raise ValueError(f"table{entry.table} row {entry.row} learns from no teacher: leave --teacher out")
    options |= extra or {}
    start = options.get("--init")
    if start and not start.startswith("hub:") and not Path(start).exists():
        raise ValueError(
            f"table{entry.table} row {entry.row} starts from an ImageNet-1K run of {entry.setup.model}, "
            f"and {start} is not there: train that first, or name another start with --init"
        )
    teacher = options.get("--teacher")
    if teacher and not Path(teacher).exists():
        raise ValueError(
            f"table{entry.table} row {entry.row} learns from a run of {entry.setup.teacher_model} with "
            f"{entry.setup.teacher_attention}, and {teacher} is not there: train that first, or name another with "
            "--teacher"
        )
    return options


def run_row(entry: Entry, scale: float = 1.0, extra: dict[str, str] | None = None) -> dict[str, float]:
    """Measure a row: train it (or count what it costs) and return {metric: value} in the units of the paper.

    scale, extra: as `run_options`. Raises ValueError as it does, and what training raises.
    """
    if entry.runnable[0] and entry.setup.kind == "cost":
        return measure_cost(entry)
    options = run_options(entry, scale, extra)
    from karat import runs

    program = entry.setup.program
    module, function = TRAINERS[program].split(":")
    getattr(importlib.import_module(module), function)(command_words(program, options)[len(program) :])
    last = runs.read_history(Path(options["--output"]))[-1]
    return {metric: float(last[metric]) for metric in FIGURES if metric in last}


def scaled_command(entry: Entry, scale: float, extra: dict[str, str] | None = None) -> str:
    """The command that `run_row` amounts to."""
    return command_line(entry.setup.program, run_options(entry, scale, extra))


def measure_cost(entry: Entry) -> dict[str, float]:
    """Parameters (M) and multiply-adds (G) of a row's model at 224², built at full size."""
    import torch

    from karat.models.create import create_model
    from karat.models.flops import count_parameters, multiply_adds, operator_parameters

    setup = entry.setup
    model = create_model(setup.model, attention=setup.attention, num_classes=setup.num_classes)
    return {
        "params_M": count_parameters(model) / 1e6,
        "activation_params_M": operator_parameters(model) / 1e6,
        "GFLOPs": multiply_adds(model, torch.zeros(1, 3, 224, 224)) / 1e9,
    }
