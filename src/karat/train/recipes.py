"""Training recipes: every hyper-parameter of a run, under timm's names, with the source of each value.

A recipe says how a model is trained and nothing about which model or which images. The presets `vit`,
`convit` and `swin` are the published ones (arXiv 2503.10632, Tables 5, 9 and 10); `finetune`, `quick`
and `digits` are ours.

>>> RECIPES["vit"].scaled_lr(total_batch=1024)
0.001
>>> RECIPES["vit"].override(epochs=300, mixup=0.0).epochs
300
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

CROP_MODES = ("rrc", "rkrc", "rkrr", "pad")
MIXUP_MODES = ("batch", "pair", "elem")
_NOT_NEGATIVE = (
    "weight_decay",
    "coefficient_weight_decay",
    "warmup_epochs",
    "warmup_lr",
    "min_lr",
    "color_jitter",
    "aug_repeats",
    "mixup",
    "cutmix",
)


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run.

    Rates: the optimiser's peak rate is `lr * total_batch / 512` (the published rule); `warmup_lr` and
    `min_lr` are absolute. Basis coefficients and W form their own parameter group: `coefficient_lr` (scaled
    like `lr`; None: `lr` itself) and `coefficient_weight_decay`, 0 by default: decay would pull every edge
    function towards zero, and the paper does not say that it decayed them.

    Augmentation: `train_crop_mode` is timm's ("rrc": random resized crop by `scale` and `ratio`, "rkrc",
    "rkrr") or "pad" (the image shifted by up to an eighth of its side over a zero border, the habit for
    small images). As in timm, `color_jitter` acts only where `aa` is None. `mixup` and `cutmix` are the
    alphas of their Beta distributions, 0 switches one off, `mixup_switch_prob` is the share of cutmix where
    both are on.

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
    coefficient_lr: float | None = None
    """Rate of basis coefficients and W, scaled like lr; none: lr."""
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
    warmup_epochs: int = 5
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end."""
    batch_size: int = 128
    """Images per process and batch."""
    model_ema_decay: float | None = None
    """Decay of the averaged weights; none: no average."""
    # crop and flip
    train_crop_mode: str = "rrc"
    """rrc, rkrc, rkrr, or pad: shifted over a border."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a random crop's share of the area."""
    ratio: tuple[float, float] = (0.67, 1.5)
    """Range of a random crop's aspect ratio."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    train_interpolation: str = "bicubic"
    """Interpolation of training images."""
    interpolation: str = "bicubic"
    """Interpolation of evaluation images."""
    crop_pct: float = 0.9
    """Share of the side that the evaluation's centre crop keeps."""
    # colour and erasing
    color_jitter: float = 0.4
    """Strength of colour jitter, where aa is none."""
    aa: str | None = None
    """timm's spec of RandAugment or AutoAugment; none: neither."""
    reprob: float = 0.0
    """Probability of random erasing."""
    remode: str = "pixel"
    """What is written over an erased part: const, rand or pixel."""
    recount: int = 1
    """Number of erased parts."""
    aug_repeats: int = 0
    """Repeats of an image in an epoch (repeated augmentation); 0: none."""
    # mixing and targets
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """Share of cutmix where both are on."""
    mixup_mode: str = "batch"
    """What shares one mixing ratio: batch, pair or elem."""
    smoothing: float = 0.1
    """Label smoothing."""
    # model
    drop: float = 0.0
    """Dropout."""
    drop_path: float = 0.0
    """Stochastic depth."""

    def __post_init__(self) -> None:
        for name in ("opt_betas", "scale", "ratio"):  # lists arrive from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("lr", "opt_eps", "epochs", "batch_size", "crop_pct"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "give a positive value")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability lies in [0, 1]")
        for name in ("smoothing", "drop", "drop_path"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a value in [0, 1)")
        for name in _NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("clip_grad", "coefficient_lr", "layer_decay"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "give a positive value or none")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            ordered = len(value) == 2 and 0 < value[0] <= value[1]
            _require(ordered, name, value, "give (low, high), 0 < low <= high")
        _require(self.crop_pct <= 1, "crop_pct", self.crop_pct, "give a value in (0, 1]")
        _require(self.scale[1] <= 1, "scale", self.scale, "a crop's area is at most 1")
        ema = self.model_ema_decay
        _require(ema is None or 0 < ema < 1, "model_ema_decay", ema, "give a value in (0, 1) or none")
        for name, choices in (("train_crop_mode", CROP_MODES), ("mixup_mode", MIXUP_MODES)):
            value = getattr(self, name)
            _require(value in choices, name, value, f"one of {', '.join(choices)}")

    def scaled_lr(self, total_batch: int) -> float:
        """The peak rate lr * total_batch / 512; total_batch counts all processes and accumulated batches."""
        return self.lr * total_batch / 512

    def scaled_coefficient_lr(self, total_batch: int) -> float:
        """The same for basis coefficients and W: coefficient_lr (or lr) * total_batch / 512."""
        return (self.lr if self.coefficient_lr is None else self.coefficient_lr) * total_batch / 512

    def override(self, **values: Any) -> Recipe:
        """A copy with some values changed. Raises ValueError for a name that no recipe has."""
        known = {f.name for f in fields(self)}
        for name in values:
            if name not in known:
                raise ValueError(f"a recipe has no {name!r}; it has {', '.join(sorted(known))}")
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Recipe(**d)` is the inverse."""
        return asdict(self)


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"recipe: {name}={value!r}: {remedy}")


VIT = Recipe(
    # arXiv 2503.10632, Table 5: ViT-Tiny/Small/Base at 224², from scratch, 100 epochs. Batch 128 is
    # ImageNet-1K's; CIFAR uses 32. The paper names mixup and cutmix without alphas: 0.8 and 1.0 are DeiT's.
    opt_eps=1e-6,
    lr=5e-4,
    weight_decay=0.05,
    clip_grad=1.0,
    epochs=100,
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
    batch_size=128,
    model_ema_decay=0.99992,
    scale=(0.08, 1.0),
    ratio=(0.67, 1.5),
    hflip=0.5,
    crop_pct=0.9,
    color_jitter=0.4,
    aa="rand-m15-n2-mstd1.0-inc1",
    mixup=0.8,
    cutmix=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    smoothing=0.1,
)

CONVIT = VIT.override(
    # Table 9. Locality up to layer 10 and locality strength 1 are in timm's convit_tiny as it stands.
    opt_eps=1e-8,
    aa="rand-m9-mstd0.5-inc1",
    model_ema_decay=None,
)

SWIN = VIT.override(
    # Table 10. Window 7 belongs to the model: timm's swin_tiny_patch4_window7_224 has it.
    opt_eps=1e-8,
    aa="rand-m9-mstd0.5-inc1",
    color_jitter=0.3,
    model_ema_decay=None,
)

FINETUNE = VIT.override(
    # Ours: the paper fine-tunes (Table 2) without giving settings. DeiT's augmentation and regularisation
    # (arXiv 2012.12877, Table 9), AdamW at a fifth of the rate from scratch so that the weights taken over
    # keep what they know; an operator that starts fresh has nothing to keep and learns at the full rate.
    lr=1e-4,
    opt_eps=1e-8,
    coefficient_lr=5e-4,
    epochs=30,
    warmup_epochs=3,
    min_lr=1e-6,
    batch_size=64,
    model_ema_decay=None,
    ratio=(3 / 4, 4 / 3),
    aa="rand-m9-mstd0.5-inc1",
    reprob=0.25,
    drop_path=0.1,
)

QUICK = Recipe(
    # Ours: small images (digits, CIFAR at 32²) and small models in minutes. Light augmentation, so that all
    # images stay decoded in memory and a batch is cropped and mirrored at once; a high rate for small models.
    lr=4e-3,
    opt_betas=(0.9, 0.99),
    weight_decay=0.05,
    clip_grad=1.0,
    epochs=20,
    warmup_epochs=2,
    warmup_lr=1e-6,
    min_lr=1e-5,
    batch_size=128,
    train_crop_mode="pad",
    crop_pct=1.0,
    hflip=0.5,
    color_jitter=0.0,
    smoothing=0.1,
)

DIGITS = QUICK.override(
    # Ours: scikit-learn's 1,438 training digits. So few images give few updates an epoch: small batches, many epochs.
    lr=2e-2,
    batch_size=32,
    epochs=30,
)

RECIPES: dict[str, Recipe] = {
    "vit": VIT,
    "convit": CONVIT,
    "swin": SWIN,
    "finetune": FINETUNE,
    "quick": QUICK,
    "digits": DIGITS,
}


def get_recipe(name: str) -> Recipe:
    """The preset of that name. Raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the presets are {', '.join(RECIPES)}")
    return RECIPES[name]
