"""How weights are optimised, whatever the model is for: optimiser, schedule, clipping, averaging."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from karat.errors import require
from karat.runs.renamed import renamed

_NOT_NEGATIVE = ("weight_decay", "coefficient_weight_decay", "warmup_epochs", "warmup_lr", "min_lr")


@dataclass(frozen=True)
class Optimisation:
    """The hyper-parameters that every kind of training has.

    Rates: the optimiser's peak rate is `scaled_lr(total_batch)`; `warmup_lr` and `min_lr` are absolute. Basis
    coefficients and W form their own parameter group, with `operator_lr_scale` times the rate of the rest and
    `coefficient_weight_decay`, 0 by default: decay would pull every edge function towards zero, and the paper does not
    say that it decayed them.

    Raises ValueError for a value outside its range.
    """

    # optimiser
    opt: str = "adamw"
    """timm's name of the optimiser."""
    lr: float = 5e-4
    """Peak learning rate per 512 images of total batch."""
    opt_eps: float = 1e-8
    """The optimiser's epsilon."""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """The optimiser's betas."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms and basis coefficients excepted."""
    operator_lr_scale: float = 1.0
    """Factor of the operators' learning rate; nobody should need it."""
    coefficient_weight_decay: float = 0.0
    """Weight decay of basis coefficients and W."""
    layer_decay: float | None = None
    """Factor of the learning rate from each block to the one below; none: 1."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; none: no clipping."""
    # schedule
    sched: str = "cosine"
    """timm's name of the schedule, stepped at every update."""
    epochs: int = 100
    """Passes over the training images."""
    milestones: tuple[float, ...] = (8 / 9, 26 / 27)
    """Under sched multistep: where the rate falls tenfold, as fractions of the run."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    warmup_prefix: bool = False
    """The decay begins at the peak, after the warm-up (one cycle); off: it runs beneath, and goes on from there."""
    min_lr: float = 1e-5
    """Learning rate at the end."""
    batch_size: int = 128
    """Images per process and batch."""
    model_ema_decay: float | None = None
    """Decay of the averaged weights; none: no average."""
    # model
    drop: float = 0.0
    """Dropout."""
    drop_path: float = 0.0
    """Stochastic depth."""

    def __post_init__(self) -> None:
        for name in ("opt_betas", "milestones"):  # lists arrive from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("lr", "opt_eps", "epochs", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "give a positive value")
        for name in ("drop", "drop_path"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a value in [0, 1)")
        for name in _NOT_NEGATIVE:
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("clip_grad", "layer_decay"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "give a positive value or none")
        scale = self.operator_lr_scale
        require(math.isfinite(scale) and scale > 0, "operator_lr_scale", scale, "give a finite value above 0")
        steps = self.milestones
        ordered = list(steps) == sorted(steps) and all(0 < step < 1 for step in steps)
        require(ordered, "milestones", steps, "give growing fractions in (0, 1)")
        ema = self.model_ema_decay
        require(ema is None or 0 < ema < 1, "model_ema_decay", ema, "give a value in (0, 1) or none")

    def scaled_lr(self, total_batch: int) -> float:
        """The peak rate; total_batch counts all processes and accumulated batches."""
        return self.lr

    def override(self, **values: Any) -> Self:
        """A copy with some values changed. Raises ValueError for a name that no recipe has."""
        values = renamed(values, values.get("lr", self.lr))
        known = {f.name for f in fields(self)}
        for name in values:
            if name not in known:
                raise ValueError(f"a recipe has no {name!r}; it has {', '.join(sorted(known))}")
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the class called with them is the inverse."""
        return asdict(self)
