"""A run's tensors gathered from, and given back to, whatever layout the launcher chose: one process, DDP or FSDP2.

Names are those of the bare model, so a checkpoint written under one layout resumes under another.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded

from karat.operator.operator import with_factors
from karat.runs.checkpoint import (
    COUNTER,
    check_fit,
    load_weights,
    pack_counters,
    pack_optimizer,
    unpack_counters,
    unpack_optimizer,
)

WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def bare(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model without DDP's wrapper (FSDP2 shards in place and has none)."""
    unwrapped: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    return unwrapped


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters are sharded; ValueError for FSDP's first version, whose layout hides parameters."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not served: set fsdp_version: 2 (FSDP_VERSION=2) for the launcher")
    return True


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter, shared ones under their first name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def model_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The model's whole state by bare names; on the main process under FSDP."""
    if is_sharded(accelerator):
        whole: dict[str, Any] = dict(sharded.get_model_state_dict(model, options=WHOLE))
        return whole
    return bare(accelerator, model).state_dict()


def load_model_state(accelerator: Accelerator, model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Give the model the weights read from `source`; ValueError names the first difference."""
    if is_sharded(accelerator):
        weights = with_factors(model, weights)
        check_fit(dict[str, Any](sharded.get_model_state_dict(model)), weights, source)
        sharded.set_model_state_dict(model, dict[str, Any](weights), options=WHOLE)
        return
    load_weights(bare(accelerator, model), weights, source)


def optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's whole state as tensors named `parameter/entry`."""
    if is_sharded(accelerator):
        state: Any = sharded.get_optimizer_state_dict(model, optimizer, options=WHOLE)
        entries = state.get("state", {})  # only the main process is given any
        packed = {f"{name}/{key}": value for name, entry in entries.items() for key, value in entry.items()}
        return packed | pack_counters(state["param_groups"] if entries else [])
    return pack_optimizer(optimizer, names_of(bare(accelerator, model)))


def load_optimizer_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    packed: dict[str, Tensor],
    updates: int = 0,
) -> None:
    """Give the optimiser back what `optimizer_state` took after so many updates; rates and decay stay the settings'."""
    if not is_sharded(accelerator):
        unpack_optimizer(optimizer, names_of(bare(accelerator, model)), packed, updates)
        return
    state: Any = sharded.get_optimizer_state_dict(model, optimizer)  # in shards: every process has its groups
    entries: dict[str, dict[str, Tensor]] = {}
    for full_name, value in packed.items():
        name, key = full_name.rsplit("/", 1)
        if key != COUNTER:
            entries.setdefault(name, {})[key] = value
    unpack_counters(state["param_groups"], packed, updates)
    sharded.set_optimizer_state_dict(model, optimizer, state | {"state": entries}, options=WHOLE)
