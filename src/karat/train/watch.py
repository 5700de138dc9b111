"""An eye on the operators while they learn: the paper saw their training explode.

Three guards stand together: the gradient is clipped (`clip_grad`, on in every recipe), operators may have a rate of
their own (`coefficient_lr`), and each epoch reports how far their parameters have grown, with a warning beyond LIMIT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karat.train.optim import operator_parameters
from karat.train.optimisation import Optimisation

LIMIT = 10.0  # times the size at the start
MOST = 10.0  # times the rate of the rest that passes without a word


@torch.no_grad()
def sizes(model: nn.Module) -> dict[str, float]:
    """The root mean square of each operator parameter; every process must call it where parameters are sharded."""
    return {name: _whole(p).float().square().mean().sqrt().item() for name, p in operator_parameters(model).items()}


def _whole(parameter: Tensor) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)  # FSDP2's parameters are sharded
    return parameter.detach() if gather is None else gather()


def growth(start: dict[str, float], now: dict[str, float]) -> tuple[float, str]:
    """The largest ratio of a size now to the size at the start, and whose it is; gates that start at 0 don't count.

    (1.0, "") where nothing counts.

    >>> growth({"a": 0.5, "gate": 0.0}, {"a": 2.0, "gate": 0.3})
    (4.0, 'a')
    """
    ratios = {name: now[name] / size for name, size in start.items() if size > 1e-6 and name in now}
    if not ratios:
        return 1.0, ""
    worst = max(ratios, key=ratios.__getitem__)
    return ratios[worst], worst


def warning(ratio: float, name: str) -> str | None:
    """What to say about a growth; None where there is nothing to say."""
    if ratio < LIMIT:
        return None
    return (
        f"{name} has grown to {ratio:.1f} times its size at the start: the operator's training may explode; lower "
        "--coefficient-lr or --clip-grad, or set --coefficient-weight-decay"
    )


def rate_warning(recipe: Optimisation) -> str | None:
    """What to say about the operators' own learning rate; None where there is nothing to say."""
    ratio = 1.0 if recipe.coefficient_lr is None else recipe.coefficient_lr / recipe.lr
    if ratio <= MOST:
        return None
    return f"the operators learn at {ratio:.0f} times the rate of the rest (--coefficient-lr): watch operator_growth"
