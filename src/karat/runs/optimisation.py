"""How weights are optimised, whatever the model is for: optimiser, schedule, clipping, averaging."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Self

from karat.runs.renamed import renamed
from karat.values import Below1, Count, Growing, Inner, NotNegative, Positive, check


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
    lr: Positive = 5e-4
    """Peak learning rate per 512 images of total batch."""
    opt_eps: Positive = 1e-8
    """The optimiser's epsilon."""
    opt_betas: tuple[Below1, Below1] = (0.9, 0.999)
    """The optimiser's betas."""
    weight_decay: NotNegative = 0.05
    """Weight decay; biases, norms and basis coefficients excepted."""
    operator_lr_scale: Positive = 1.0
    """Factor of the operators' learning rate; nobody should need it."""
    coefficient_weight_decay: NotNegative = 0.0
    """Weight decay of basis coefficients and W."""
    layer_decay: Positive | None = None
    """Factor of the learning rate from each block to the one below; none: 1."""
    clip_grad: Positive | None = 1.0
    """Largest norm of the gradient; none: no clipping."""
    # schedule
    sched: str = "cosine"
    """timm's name of the schedule, stepped at every update."""
    epochs: Count = 100
    """Passes over the training images."""
    milestones: Annotated[tuple[Inner, ...], Growing("give growing fractions in (0, 1)")] = (8 / 9, 26 / 27)
    """Under sched multistep: where the rate falls tenfold, as fractions of the run."""
    warmup_epochs: NotNegative = 5
    """Epochs of linear warm-up."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    warmup_prefix: bool = False
    """The decay begins at the peak, after the warm-up (one cycle); off: it runs beneath, and goes on from there."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end."""
    batch_size: Count = 128
    """Images per process and batch."""
    model_ema_decay: Inner | None = None
    """Decay of the averaged weights; none: no average."""
    # model
    drop: Below1 = 0.0
    """Dropout."""
    drop_path: Below1 = 0.0
    """Stochastic depth."""

    def __post_init__(self) -> None:
        check(self)

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
