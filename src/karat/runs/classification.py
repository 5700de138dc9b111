"""Everything that a classifier's run is made of: what config.json holds and the command line offers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from karat.basis.specs import without
from karat.data.images import read_image
from karat.data.splits import Opener, is_path
from karat.models.create import PREFIX, check_said_once
from karat.models.kan.peers import DEEP_KAN
from karat.models.starts import STARTS
from karat.runs.recipes import RECIPES, Recipe, get_recipe, recipe_of
from karat.runs.settings import AUTO, RunSettings, data_slug, first_change, slug
from karat.values import Count, Label, Natural, OneOf, local_path

__all__ = ["AUTO", "Settings", "first_change", "is_small", "preset_for", "resolve"]

# What `--model auto` means for small images, and for the 8x8 digits: ViTs that train on two cores.
SMALL_MODEL = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
DIGITS_MODEL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
SMALL_DATA = ("digits", *map("torch/{}".format, ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn")))
SMALL_SIDE = 64
# Of other data all is taken, from where such data usually lies.
OTHER_DATA: dict[str, Any] = {"data_fraction": 1.0, "data_dir": None, "num_samples": None, "held_out": 0}


@dataclass(frozen=True)
class Settings(RunSettings):
    """Train one model. A run is one folder: config.json, metrics.jsonl, weights as safetensors, checkpoints, events."""

    task: ClassVar[str] = "classify"
    command: ClassVar[str] = "karat train"
    recipe_type: ClassVar[type[Recipe]] = Recipe
    facts: ClassVar[dict[str, Any]] = RunSettings.facts | {
        "num_classes": Count,
        "in_chans": Count,
        "class_names": list[Label | int] | None,
        "train_images": Natural | None,
        "eval_images": Natural | None,
    }

    model: str = AUTO
    """timm's name of a model with attention; auto: a small ViT for small images, else vit_tiny_patch16_224."""
    data: str = "digits"
    """digits, torch/NAME, hfds/NAME, hfids/NAME, wds/SHARDS, or the path of an image or parquet folder."""
    preset: Annotated[str, tyro.conf.arg(name="recipe")] = AUTO
    """Training recipe: vit, convit, swin, finetune, quick, digits; auto: finetune with --init, digits for digits, quick
    for other small images, else the model's own. Its values are the defaults of the options below."""
    data_dir: str | None = None
    """Where torch/NAME lies or is downloaded to; none: $KARAT_DATA or ~/.cache/karat."""
    init: str | None = None
    """Start from the weights of a RUN, a saved model's folder, a safetensors FILE or hub:NAME, with a new head where
    the classes differ."""
    output: Path | None = None
    """The run's folder; none: runs/DATA-MODEL-ATTENTION-sSEED."""
    attn_init: Annotated[str, OneOf(tuple(STARTS))] | None = None
    """How queries, keys, values and projections start: mimetic, impulse, matched; none: as timm draws them."""
    mlp: str = "mlp"
    """MLP of the model: mlp (its own), kan, grkan, fourierkan, fastkan, or one with settings, "kan(grid=5,ratio=2)"."""
    img_size: Count | None = None
    """Side of the input images in pixels; none: the model's own."""
    num_samples: Count | None = None
    """Training images of a stream that does not say how many it has."""
    held_out: Natural = 0
    """Training images to evaluate on in place of the evaluation images, a fixed random part; 0: none."""
    num_classes: Count | None = None
    """Number of classes; none: as many as the data has."""
    teacher: str | None = None
    """Use the attention of this trained RUN in every block, frozen, and learn the rest (karat transfer)."""
    channels_last: bool = False
    """Keep images in channels-last memory format."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: RECIPES["digits"])

    def __post_init__(self) -> None:
        if isinstance(self.model, str):  # a start is said in one place, wherever it was given
            model, start = without(self.model, "attn_init")
            if start is not None:
                check_said_once({"attn_init": start}, {"attn_init": self.attn_init} if self.attn_init else {})
                object.__setattr__(self, "model", model)
                object.__setattr__(self, "attn_init", start)
        super().__post_init__()
        if self.img_size is not None and self.patch_size is not None and self.patch_size > self.img_size:
            raise ValueError(f"patch_size={self.patch_size} is larger than the images, img_size={self.img_size}")
        if self.teacher is not None and self.attention != "softmax":
            raise ValueError(
                f"attention={self.attention!r}: a student uses its teacher's attention; leave --attention out"
            )
        if self.attn_init is not None and (self.init or self.teacher):
            raise ValueError(f"attn_init={self.attn_init} is undone by what --init or a teacher brings: leave one out")

    def check_facts(self, facts: dict[str, Any]) -> None:
        """As RunSettings.check_facts: a class has a name or, where more were asked for than the data has, none."""
        names, classes = len(facts.get("class_names") or ()), facts["num_classes"]
        if names > classes or (0 < names < classes and self.num_classes is None):
            raise ValueError(f"{names} class_names for num_classes={classes}")

    @classmethod
    def make(cls, opened: Opener | None = None, /, **values: Any) -> Settings:
        """Settings from values of either kind: `recipe` names a preset, and its values may stand beside the others.

        opened: as for `resolve`.

        >>> Settings.make(data="torch/cifar10", attention="g3b", epochs=5).recipe.epochs
        5
        """
        own = {f.name for f in fields(cls)}
        preset = values.pop("recipe", AUTO)
        mine = {name: value for name, value in values.items() if name in own}
        base = cls(**mine, preset=preset)
        opened = opened or Opener()
        recipe = get_recipe(preset_for(preset, base.data, base.model, base.init, opened))
        recipe = recipe.override(**{k: v for k, v in values.items() if k not in own})
        return resolve(replace(base, recipe=recipe), opened)

    @property
    def label(self) -> str:
        """What sets the run apart on the same data: attention, with MLP and start, or a deep KAN's name."""
        if self.model.partition("(")[0] == DEEP_KAN:
            return self.model
        return "/".join([self.attention, *self._beside_attention()])

    def _beside_attention(self) -> list[str]:
        """MLP and start, where they aren't the model's own."""
        return [*([] if self.mlp == "mlp" else [self.mlp]), *([self.attn_init] if self.attn_init else [])]

    @property
    def starts_from(self) -> tuple[str | None, ...]:
        return self.init, self.teacher

    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of the model's constructor that are set."""
        return self.sizes if self.mlp == "mlp" else self.sizes | {"mlp": self.mlp}

    def folder_name(self) -> str:
        """DATA-MODEL-ATTENTION-sSEED, MLP and start behind the attention where they aren't the model's own.

        A student's attention is `from-TEACHER`.
        """
        attention = self.attention if self.teacher is None else f"from-{Path(self.teacher).resolve().name}"
        parts = [data_slug(self.data), slug(self.model), slug(attention)]
        parts += [slug(part) for part in self._beside_attention()]
        return "-".join([*parts, f"s{self.seed}"])


def is_small(data: str, opened: Opener | None = None) -> bool:
    """Whether a data spec means small images: by its name, or by the first image of a folder that is there."""
    if not is_path(data) or not local_path(data).is_dir():
        return data.rstrip("/").lower() in SMALL_DATA  # as torch/NAME is read
    part: Any = (opened or Opener()).splits(data).train
    try:
        return max(read_image(part[0].image).size) <= SMALL_SIDE
    except Exception:  # an unreadable first image is reported, or skipped, when the data is loaded
        return False


def preset_for(preset: str, data: str, model: str, init: str | None, opened: Opener | None = None) -> str:
    """The recipe's name that `auto` stands for."""
    if preset != AUTO:
        return preset
    if init is not None:
        return "finetune"
    if data == "digits":
        return "digits"
    if is_small(data, opened):
        return "quick"
    return recipe_of(model.removeprefix(PREFIX))


def resolve(settings: Settings, opened: Opener | None = None) -> Settings:
    """Settings with every `auto` replaced by what it stands for, so that config.json repeats the run.

    opened: what opens the data, where that takes a look at it.
    """
    preset = preset_for(settings.preset, settings.data, settings.model, settings.init, opened)
    get_recipe(preset)  # an unknown name is refused here
    values: dict[str, Any] = {"preset": preset}
    if settings.model == AUTO:
        values["model"] = "vit_tiny_patch16_224"
        if is_small(settings.data, opened):
            small = DIGITS_MODEL if settings.data == "digits" else SMALL_MODEL
            values |= {name: size for name, size in small.items() if getattr(settings, name) is None}
    return replace(settings, **values)
