"""What a model costs: parameters, multiply-adds, memory and speed, beside softmax and the published figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat.models.create import create_model
from karat.models.evaluating import evaluating
from karat.models.flops import count_parameters, multiply_adds, operator_parameters
from karat.paper.published import values_by_model
from karat.paper.setup import COUNTED_CLASSES, MODELS

# What the paper publishes, by timm's name and attention: params_M, GFLOPs (a multiply-add counts as one), and
# gpu_memory_GB_batch32 (Table 13).
PUBLISHED = {(MODELS[model], variant): values for (model, variant), values in values_by_model(13).items()}
CLASSES = {MODELS[model]: classes for model, classes in COUNTED_CLASSES.items()}  # the others are counted with 10


@dataclass(frozen=True)
class ModelCost:
    """What one of the published models costs here. Parameters with s_f and s_b, as the paper counts, and as run."""

    model: str
    attention: str
    added_parity: int
    total_parity: int
    added: int
    total: int
    multiply_adds: int
    published: dict[str, float]


def bytes_kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, parameters and buffers not counted, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(images)  # held until the count is made, so that no storage's address is used again
    total = sum(kept.values())
    del out
    return total


def images_per_second(model: nn.Module, images: Tensor, *, repeats: int = 5) -> float:
    """Images a second in inference: the median of `repeats` forward passes after one to warm up."""
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    seconds = []
    with evaluating(model), torch.inference_mode():
        for _ in range(repeats + 1):
            _synchronise(images)
            began = time.perf_counter()
            model(images)
            _synchronise(images)
            seconds.append(time.perf_counter() - began)
    return len(images) / statistics.median(seconds[1:])


def _synchronise(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def cost_of(model: str, attention: str) -> ModelCost:
    """What one of the nine models of the paper's Tables 1 and 13 costs, at 224² and with its number of classes.

    Raises ValueError for a model that those tables don't have.
    """
    published = PUBLISHED.get((model, attention))
    if published is None:
        known = "; ".join(f"{name} {spec}" for name, spec in PUBLISHED)
        raise ValueError(f"the paper has no figures for {model} {attention}; it has {known}")
    classes = CLASSES.get(model, 10)
    built = create_model(model, attention=attention, num_classes=classes)
    added, total = operator_parameters(built), count_parameters(built)
    added_parity, total_parity = added, total
    if attention != "softmax":
        with torch.device("meta"):  # only counted: no need to draw its numbers
            parity = create_model(model, attention=f"{attention},edge_scales=published", num_classes=classes)
        added_parity, total_parity = operator_parameters(parity), count_parameters(parity)
    return ModelCost(
        model=model,
        attention=attention,
        added_parity=added_parity,
        total_parity=total_parity,
        added=added,
        total=total,
        multiply_adds=multiply_adds(built, torch.zeros(1, 3, 224, 224)),
        published=published,
    )


def cost_table() -> list[ModelCost]:
    """`cost_of` the nine models, in the paper's order of sizes."""
    return [cost_of(model, attention) for model, attention in PUBLISHED]


def print_cost_table(costs: list[ModelCost]) -> None:
    """The table of `karat bench cost`: what each model costs here, the published figures beside it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="forward pass at 224², batch 1", caption=_CAPTION, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in ("added", "added\nas run", "total\nM", "paper\nM", "as run\nM", "MACs\nG", "paper\nG"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(
            f"{cost.model.removeprefix('vit_').removesuffix('_patch16_224')} {cost.attention}",
            f"{cost.added_parity:,}",
            f"{cost.added:,}",
            f"{cost.total_parity / 1e6:.2f}",
            f"{cost.published['params_M']:.2f}",
            f"{cost.total / 1e6:.2f}",
            f"{cost.multiply_adds / 1e9:.3f}",
            f"{cost.published['GFLOPs']:.3f}",
        )
    Console(markup=False).print(table)


_CAPTION = (
    "added, total: with both edge scales, as the paper counts (as run: without). MACs: multiply-adds of all matrix "
    "products as run here, half of the FLOPs. paper: its Tables 1 and 13"
)
