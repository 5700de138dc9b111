"""The parts of a training run that settings describe: accelerator, model, optimiser, schedule, and all together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from karat.operator.config import KArAtConfig
from karat.runs.settings import RunSettings
from karat.train.ema import WeightAverage
from karat.train.init import Transplanted
from karat.train.optim import create_optimizer, create_schedule
from karat.train.processes import leave_at_exit
from karat.train.randomness import seed_everything
from karat.train.state import bare
from karat.train.task import Objective, Task
from karat.train.watch import GradientWatch

STATISTICS = ("running_", "num_batches_")
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def create_accelerator(settings: RunSettings, *, training: bool = True) -> Accelerator:
    """accelerate's view of this process: device, precision, and DDP or FSDP as the launcher says.

    ValueError when `training` in a precision that needs a device which is not there; else float32 stands in for it.
    """
    # A second run in the same process may ask for another precision, and learns anew how it is launched: what the first
    # one noted (FSDP) accelerate takes for no launch of its own. The process group stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    config = KArAtConfig.parse(settings.attention)
    # DDP has to be told that parameters may stay unused: the published s_b gets no gradient while b = 0 (SPEC §2),
    # and the norms of queries and keys none where nothing that is learned looks at them through the scores
    unused = config.edge_scales == "published" or config.is_static
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused)]
    leave_at_exit()
    accelerator = Accelerator(
        mixed_precision=PRECISION[settings.amp_dtype],
        cpu=settings.device == "cpu",
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )
    # accelerate would go on in float32
    if training and settings.amp_dtype == "float16" and accelerator.device.type == "cpu":
        raise ValueError("amp_dtype=float16 needs a GPU: on the CPU give bfloat16 or float32")
    return accelerator


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """timm's set_grad_checkpointing; ValueError for a model that has none."""
    switch = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError
        switch(True)
    except AssertionError:  # some of timm's models have the method in order to refuse
        raise ValueError(f"{name} can't recompute activations: leave --grad-checkpointing out") from None


@dataclass
class Parts:
    """What an update needs, ready on its device."""

    settings: RunSettings
    accelerator: Accelerator
    model: nn.Module  # as accelerate wrapped it
    bare: nn.Module  # without the wrapper
    optimizer: AcceleratedOptimizer
    schedule: Scheduler
    ema: WeightAverage | None
    objective: Objective  # of the model and a batch on its device
    watch: GradientWatch
    statistics: list[Tensor]  # the model's buffers that a forward pass changes: means and variances of batches
    parameters: int
    loaded: list[Transplanted]  # what --init took over, kept or dropped


def assemble(
    task: Task[Any, Any],
    settings: RunSettings,
    accelerator: Accelerator,
    data: Any,
    *,
    updates_per_epoch: int,
    folder: Path | None = None,
) -> Parts:
    """Build everything from the settings' seed; afterwards every process has random states of its own.

    folder: of the run that is resumed; None for a new one.
    """
    recipe = settings.recipe
    seed_everything(settings.seed)
    model, loaded = task.build(settings, data, folder)
    if settings.grad_checkpointing:
        checkpoint_gradients(model, settings.model)
    count = sum(p.numel() for p in model.parameters())
    total_batch = recipe.batch_size * settings.grad_accum_steps * accelerator.num_processes
    optimizer = create_optimizer(model, recipe, total_batch, accelerator.device)
    if settings.compile:
        task.compile(model)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    plain = bare(accelerator, wrapped)
    seed_everything(settings.seed + accelerator.process_index)  # processes mix and drop differently
    return Parts(
        settings=settings,
        accelerator=accelerator,
        model=wrapped,
        bare=plain,
        optimizer=prepared,
        schedule=create_schedule(prepared.optimizer, recipe, updates_per_epoch),
        ema=None if recipe.model_ema_decay is None else WeightAverage(plain, recipe.model_ema_decay),
        objective=task.objective(settings, data),
        watch=GradientWatch(plain),
        statistics=[x for n, x in plain.named_buffers() if n.rpartition(".")[2].startswith(STATISTICS)],
        parameters=count,
        loaded=loaded,
    )
