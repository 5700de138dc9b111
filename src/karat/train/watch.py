"""An eye on the operators while they learn: the paper saw their training explode.

Four guards stand together: the gradient is clipped (`clip_grad`, on in every recipe); where the operators' part of it
bursts, they are clipped by their own norm, so that the rest goes on learning; they may have a rate of their own
(`operator_lr_scale`); and each epoch reports how far their parameters have grown, with a warning beyond LIMIT.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from karat.operator import karat_operators
from karat.ops.implementations import about
from karat.runs.optimisation import Optimisation
from karat.train.optim import operator_parameters

LIMIT = 10.0  # times the size at the start
BURST = 10.0  # times the running median of the gradient's norm
WINDOW, LEAST = 101, 20  # updates of that median, and how many it takes to have one


@torch.no_grad()
def sizes(model: nn.Module) -> dict[str, float]:
    """The root mean square of each operator parameter; every process must call it where parameters are sharded."""
    return {name: whole(p).float().square().mean().sqrt().item() for name, p in operator_parameters(model).items()}


def name_kernel(model: nn.Module, say: Callable[[str], None]) -> None:
    """Say what computes the model's learnable attention; nothing where none of it looks at scores."""
    operator = next((one for one in karat_operators(model).values() if one.layers), None)
    if operator is not None:
        config, like = operator.config, next(operator.parameters())
        say(f"learnable attention runs in {about(config.impl, config.edge_basis, like.detach())}")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all processes where it is sharded (FSDP2)."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather()


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
        "--lr, --operator-lr-scale or --clip-grad, or set --coefficient-weight-decay"
    )


class GradientWatch:
    """Tells when the operators alone drive the norm of a model's gradient far beyond its usual size, and clips them.

    norms: of the last updates that were applied, before clipping; a run's state, which its checkpoints hold. Where
    nothing of an operator learns nothing is watched, and no norm is kept.

    Gradients are looked at as clipping them together has left them: then they are unscaled (fp16), and what it did is
    one known factor, which can be taken back.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {id(p) for p in operator_parameters(model).values()}
        learned = [p for p in model.parameters() if p.requires_grad]
        self.operators = [p for p in learned if id(p) in own]
        self.rest = [p for p in learned if id(p) not in own]
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def operator_norm(self) -> list[Tensor]:
        """The norm of the operators' gradients as they are now, on their device; nothing where none learns."""
        return [_norm(self.operators)] if any(p.grad is not None for p in self.operators) else []

    def burst(self, norm: float, operators: float, factor: float) -> float | None:
        """The running median if the norm is a burst of the operators' making, else None; takes the norm in.

        Of their making: theirs is most of the norm (its square over half), and the rest's alone is no burst. Every
        process must call it where parameters are sharded.

        Args:
            norm, operators: of all gradients and the operators', before clipping.
            factor: by which clipping has multiplied all gradients.
        """
        median = statistics.median(self.norms) if len(self.norms) >= LEAST else None
        if self.operators:
            self.norms.append(norm)
        if median is None or norm <= BURST * median or operators**2 <= 0.5 * norm**2:
            return None
        return None if _norm(self.rest).item() / factor > BURST * median else median

    @torch.no_grad()
    def clip_apart(self, limit: float, factor: float) -> None:
        """Clip the operators' gradients by their own norm, and the rest's by theirs.

        factor: by which clipping all of them together has multiplied them; it is taken back.
        """
        for part in (self.operators, self.rest):
            again = clip_factor(_norm(part).item() / factor, limit) / factor
            for parameter in part:
                if parameter.grad is not None:
                    parameter.grad.mul_(again)


def clip_factor(norm: float, limit: float | None) -> float:
    """What torch's clipping multiplies gradients of this norm by; 1.0 without a limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def burst_warning(step: int, norm: float, median: float, recipe: Optimisation) -> str:
    """What to say about a burst of the operators' making."""
    limit = recipe.clip_grad
    clipped = limit is not None and norm > limit
    done = "are clipped by their own norm" if clipped else f"are not clipped (--clip-grad {limit})"
    return (
        f"step {step}: the operators drive the gradient's norm to {norm:.3g}, over {BURST:.0f} times its running "
        f"median of {median:.3g}, and {done}; if it happens often, begin again with a lower --lr, "
        f"--operator-lr-scale {0.3 * recipe.operator_lr_scale:.2g}, or an attention with residual=softmax"
    )


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of these parameters' gradients, 0 without any."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).float()
