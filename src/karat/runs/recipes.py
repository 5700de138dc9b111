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

from dataclasses import dataclass, fields
from typing import Annotated

from karat.data.augmentation import Augmentation
from karat.runs.optimisation import Optimisation
from karat.values import Below1, OneOf, Probability, Strength

MIXUP_MODES = ("batch", "pair", "elem")


@dataclass(frozen=True)
class Recipe(Augmentation, Optimisation):
    """Hyper-parameters of one classifier's training.

    The optimiser's peak rate is `lr * total_batch / 512` (the published rule); what else concerns the optimiser is in
    `Optimisation`, how images are seen in `Augmentation`. `mixup` and `cutmix` are the alphas of their Beta
    distributions, 0 switches one off, `mixup_switch_prob` is the share of cutmix where both are on.

    Raises ValueError for a value outside its range.
    """

    # mixing and targets
    mixup: Strength = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: Strength = 0.0
    """Alpha of cutmix; 0: none."""
    mixup_prob: Probability = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: Probability = 0.5
    """Share of cutmix where both are on."""
    mixup_mode: Annotated[str, OneOf(MIXUP_MODES)] = "batch"
    """What shares one mixing ratio: batch, pair or elem."""
    smoothing: Below1 = 0.1
    """Label smoothing."""

    @property
    def augmentation(self) -> Augmentation:
        """How images are seen, and nothing else: equal for recipes that see them alike."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})

    def scaled_lr(self, total_batch: int) -> float:
        """The peak rate lr * total_batch / 512; total_batch counts all processes and accumulated batches."""
        return self.lr * total_batch / 512


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
    # (arXiv 2012.12877, Table 9), repeated augmentation of three views as in its code, which thus sees a third of the
    # images in an epoch. AdamW at a fifth of the rate from scratch so that the weights taken over
    # keep what they know; an operator that starts fresh has nothing to keep and learns at the whole of it.
    lr=1e-4,
    opt_eps=1e-8,
    operator_lr_scale=5.0,
    epochs=30,
    warmup_epochs=3,
    min_lr=1e-6,
    batch_size=64,
    model_ema_decay=None,
    ratio=(3 / 4, 4 / 3),
    aa="rand-m9-mstd0.5-inc1",
    reprob=0.25,
    aug_repeats=3,
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


def recipe_of(model: str) -> str:
    """The preset of a family of models, by its name: "convit" of convit_tiny; "vit" of those that have none."""
    return next((name for name in RECIPES if model.startswith(name)), "vit")


def get_recipe(name: str) -> Recipe:
    """The preset of that name. Raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the presets are {', '.join(RECIPES)}")
    return RECIPES[name]
