"""Everything that a run is made of, as one typed dataclass: what config.json holds and the command line offers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from karat.kan.peers import DEEP_KAN
from karat.train.recipes import RECIPES, Recipe, get_recipe

AUTO = "auto"
# What `--model auto` means for small images, and for the 8x8 digits: ViTs that train on two cores.
SMALL_MODEL = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
DIGITS_MODEL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
SMALL_DATA = ("digits", "torch/cifar10", "torch/cifar100", "torch/mnist", "torch/fashion_mnist", "torch/svhn")
SMALL_SIDE = 64
# What may differ between a run and its continuation: nothing here changes a single bit of the result.
MAY_CHANGE = frozenset(
    {"output", "resume", "overwrite", "checkpoint_hist", "recovery_interval", "checkpoints", "max_bad_steps", "track"}
    | {"workers", "data_dir"}
)


@dataclass(frozen=True)
class Settings:
    """Train one model. A run is one folder: config.json, metrics.jsonl, weights as safetensors, checkpoints, events."""

    model: str = AUTO
    """timm's name of a ViT, DeiT, ConViT or Swin; auto: a small ViT for small images, else vit_tiny_patch16_224."""
    attention: str = "softmax"
    """Attention of the model: softmax, g3b, g1u, "bspline(grid=10,order=3)-u", "g3b,rank=4,residual=softmax" ..."""
    mlp: str = "mlp"
    """MLP of the model: mlp (its own), kan, grkan, fourierkan, fastkan, or one with settings, "kan(grid=5,ratio=2)"."""
    data: str = "digits"
    """digits, torch/NAME, hfds/NAME, hfids/NAME, wds/SHARDS, or the path of an image or parquet folder."""
    preset: Annotated[str, tyro.conf.arg(name="recipe")] = AUTO
    """Training recipe: vit, convit, swin, finetune, quick, digits; auto: finetune with --init, digits for digits, quick
    for other small images, else the model's own. Its values are the defaults of the options below."""
    img_size: int | None = None
    """Side of the input images in pixels; none: the model's own."""
    patch_size: int | None = None
    """Patch size of the model; none: the model's own."""
    embed_dim: int | None = None
    """Embedding width of the model; none: the model's own."""
    depth: int | None = None
    """Number of blocks of the model; none: the model's own."""
    num_heads: int | None = None
    """Number of heads of the model; none: the model's own."""
    data_fraction: float = 1.0
    """Share of the training and evaluation images to use, a fixed random subset."""
    data_dir: str | None = None
    """Where torch/NAME lies or is downloaded to; none: $KARAT_DATA or ~/.cache/karat."""
    num_samples: int | None = None
    """Training images of a stream that does not say how many it has."""
    num_classes: int | None = None
    """Number of classes; none: as many as the data has."""
    init: str | None = None
    """Start from the weights of a RUN, a safetensors FILE or hub:NAME, with a new head where the classes differ."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and mixing."""
    output: Path | None = None
    """The run's folder; none: runs/DATA-MODEL-ATTENTION-sSEED."""
    resume: str | None = None
    """A run's folder to go on with, or auto: go on with --output's run if there is one, else begin."""
    overwrite: bool = False
    """Begin again where the output folder already holds a run."""
    workers: int = 0
    """Processes that load data; 0 loads in the main process."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that can't be decoded ends the run, or is skipped and counted."""
    amp_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass; weights stay float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator when there is one."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up before an update."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images in channels-last memory format."""
    max_bad_steps: int = 20
    """Updates skipped for a non-finite loss or gradient before the run stops with a diagnosis."""
    checkpoint_hist: int = 2
    """Full-state checkpoints kept besides the best."""
    recovery_interval: int = 0
    """Also write a checkpoint every so many updates; 0: at each epoch's end only."""
    checkpoints: Literal["last", "trajectory"] = "last"
    """trajectory: also keep the weights of every epoch, for loss landscapes."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the numbers of each epoch go besides metrics.jsonl."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: RECIPES["digits"])

    def __post_init__(self) -> None:
        for name, least in (("grad_accum_steps", 1), ("checkpoint_hist", 1), ("max_bad_steps", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    @classmethod
    def make(cls, **values: Any) -> Settings:
        """Settings from values of either kind: `recipe` names a preset, and its values may stand beside the others.

        >>> Settings.make(data="torch/cifar10", attention="g3b", epochs=5).recipe.epochs
        5
        """
        own = {f.name for f in fields(cls)}
        preset = values.pop("recipe", AUTO)
        mine = {name: value for name, value in values.items() if name in own}
        base = cls(**mine, preset=preset)
        recipe = get_recipe(preset_for(preset, base.data, base.model, base.init))
        return resolve(replace(base, recipe=recipe.override(**{k: v for k, v in values.items() if k not in own})))

    @property
    def label(self) -> str:
        """What sets the run apart among others on the same data: attention, with MLP, or a deep KAN's name."""
        if self.model.partition("(")[0] == DEEP_KAN:
            return self.model
        return self.attention if self.mlp == "mlp" else f"{self.attention}/{self.mlp}"

    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of the model's constructor that are set."""
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return sizes if self.mlp == "mlp" else sizes | {"mlp": self.mlp}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        plain = asdict(self) | {"output": None if self.output is None else str(self.output)}
        return plain | {"track": list(self.track)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Settings:
        """Settings from what `as_dict` gave; ValueError names an entry that no setting has."""
        known = {f.name for f in fields(cls)}
        for name in plain:
            if name not in known:
                raise ValueError(f"config.json has {name!r}, which this version of karat does not know")
        values = dict(plain)
        if values.get("output") is not None:
            values["output"] = Path(values["output"])
        values["track"] = tuple(values.get("track", ()))
        values["recipe"] = Recipe(**values["recipe"])
        return cls(**values)


def is_small(data: str) -> bool:
    """Whether a data spec means small images: by its name, or by the first image of a folder that is there."""
    path = Path(data).expanduser()
    if data.startswith("torch/") or not path.is_dir():
        return data.rstrip("/") in SMALL_DATA
    from karat.train.data import open_splits
    from karat.train.data_augment import decode

    part: Any = open_splits(data).train
    try:
        return max(decode(part[0].image, 3).size) <= SMALL_SIDE
    except Exception:  # an unreadable first image is reported, or skipped, when the data is loaded
        return False


def preset_for(preset: str, data: str, model: str, init: str | None) -> str:
    """The recipe's name that `auto` stands for."""
    if preset != AUTO:
        return preset
    if init is not None:
        return "finetune"
    if data == "digits":
        return "digits"
    if is_small(data):
        return "quick"
    return next((name for name in ("convit", "swin") if model.startswith(name)), "vit")


def resolve(settings: Settings) -> Settings:
    """Settings with every `auto` replaced by what it stands for, so that config.json repeats the run."""
    preset = preset_for(settings.preset, settings.data, settings.model, settings.init)
    get_recipe(preset)  # an unknown name is refused here
    values: dict[str, Any] = {"preset": preset}
    if settings.model == AUTO:
        values["model"] = "vit_tiny_patch16_224"
        if is_small(settings.data):
            small = DIGITS_MODEL if settings.data == "digits" else SMALL_MODEL
            values |= {name: size for name, size in small.items() if getattr(settings, name) is None}
    return replace(settings, **values)


def first_change(before: Settings, after: Settings) -> str | None:
    """The first setting that a continuation may not change and does, in words; None when there is none."""
    old, new = before.as_dict(), after.as_dict()
    for name, value in old.items():
        if name in MAY_CHANGE:
            continue
        if name == "recipe":
            for key, inner in value.items():
                if list_or(inner) != list_or(new[name][key]):
                    return f"{key} was {inner!r} and is now {new[name][key]!r}"
        elif value != new[name]:
            return f"{name} was {value!r} and is now {new[name]!r}"
    return None


def list_or(value: Any) -> Any:
    """Tuples as lists, so that values compare as JSON has them."""
    return list(value) if isinstance(value, tuple) else value
