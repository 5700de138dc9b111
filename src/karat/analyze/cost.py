"""What a model costs: parameters, multiply-adds, memory and speed, beside softmax and the published figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat.models.create import create_model
from karat.models.evaluating import evaluating
from karat.models.flops import multiply_adds
from karat.operator.operator import karat_operators


@dataclass(frozen=True)
class Published:
    """One model's figures in the paper: parameters in millions (Table 1), GFLOPs and GB at batch 32 (Table 13).

    Its GFLOPs count a multiply-add as one operation.
    """

    params_M: float
    GFLOPs: float
    gpu_GB: float
    num_classes: int


# The paper counts Tiny and Base with 10 classes, Small with 1000.
PUBLISHED: dict[tuple[str, str], Published] = {
    ("vit_tiny_patch16_224", "softmax"): Published(5.53, 1.262, 2.94, 10),
    ("vit_tiny_patch16_224", "g3b"): Published(6.29, 1.425, 7.48, 10),
    ("vit_tiny_patch16_224", "g3u"): Published(5.59, 1.425, 7.29, 10),
    ("vit_small_patch16_224", "softmax"): Published(22.05, 4.614, 4.15, 1000),
    ("vit_small_patch16_224", "g3b"): Published(23.58, 4.941, 11.73, 1000),
    ("vit_small_patch16_224", "g3u"): Published(22.18, 4.941, 11.21, 1000),
    ("vit_base_patch16_224", "softmax"): Published(85.81, 17.595, 7.44, 10),
    ("vit_base_patch16_224", "g1b"): Published(87.51, 17.847, 17.36, 10),
    ("vit_base_patch16_224", "g1u"): Published(85.95, 17.847, 16.97, 10),
}


@dataclass(frozen=True)
class Cost:
    """What one of the published models costs here. Parameters with s_f and s_b, as the paper counts, and as run."""

    model: str
    attention: str
    added_parity: int
    total_parity: int
    added: int
    total: int
    multiply_adds: int
    published: Published


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters, shared ones once, those without gradient too."""
    return sum(parameter.numel() for parameter in module.parameters())


def operator_parameters(model: nn.Module) -> int:
    """Numbers that the learnable attention adds to the model, a universal operator once."""
    return sum(count_parameters(operator) for operator in karat_operators(model).values())


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


def cost_of(model: str, attention: str) -> Cost:
    """What one of the nine models of the paper's Tables 1 and 13 costs, at 224² and with its number of classes.

    Raises ValueError for a model that those tables don't have.
    """
    published = PUBLISHED.get((model, attention))
    if published is None:
        known = "; ".join(f"{name} {spec}" for name, spec in PUBLISHED)
        raise ValueError(f"the paper has no figures for {model} {attention}; it has {known}")
    classes = published.num_classes
    built = create_model(model, attention=attention, num_classes=classes)
    added, total = operator_parameters(built), count_parameters(built)
    added_parity, total_parity = added, total
    if attention != "softmax":
        with torch.device("meta"):  # only counted: no need to draw its numbers
            parity = create_model(model, attention=f"{attention},edge_scales=published", num_classes=classes)
        added_parity, total_parity = operator_parameters(parity), count_parameters(parity)
    return Cost(
        model=model,
        attention=attention,
        added_parity=added_parity,
        total_parity=total_parity,
        added=added,
        total=total,
        multiply_adds=multiply_adds(built, torch.zeros(1, 3, 224, 224)),
        published=published,
    )


def cost_table() -> list[Cost]:
    """`cost_of` the nine models, in the paper's order of sizes."""
    return [cost_of(model, attention) for model, attention in PUBLISHED]


def print_cost_table(costs: list[Cost]) -> None:
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
            f"{cost.published.params_M:.2f}",
            f"{cost.total / 1e6:.2f}",
            f"{cost.multiply_adds / 1e9:.3f}",
            f"{cost.published.GFLOPs:.3f}",
        )
    Console().print(table)


_CAPTION = (
    "added, total: with both edge scales, as the paper counts (as run: without). MACs: multiply-adds of all matrix "
    "products as run here, half of the FLOPs. paper: its Tables 1 and 13"
)
