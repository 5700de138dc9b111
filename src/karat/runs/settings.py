"""What every kind of run is made of: model, data, start, seed, folder, faults, precision; a task adds what it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from karat.operator.config import KArAtConfig
from karat.runs.optimisation import Optimisation
from karat.runs.renamed import renamed
from karat.values import Count, Label, Natural, Processes, Seed, Share, check, convert

AUTO = "auto"
# What may differ between a run and its continuation: nothing here changes a single bit of the result.
MAY_CHANGE = frozenset(
    {"output", "resume", "overwrite", "checkpoint_hist", "recovery_interval", "checkpoints", "max_bad_steps", "track"}
    | {"workers", "data_dir"}
)

# What says nothing about the trained model: the device too. A recipe is told by its values and its name.
NOT_TOLD = MAY_CHANGE | {"preset", "recipe", "device"}

Device = Literal["auto", "cpu"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RunSettings:
    """The settings that the training loop itself reads. A task's settings derive from these.

    task: its name in config.json; command: what trains it; recipe_type: the class of `recipe`; facts: the types of what
    config.json says beside the settings; those that may be None may be absent.
    """

    task: ClassVar[str]
    command: ClassVar[str]
    recipe_type: ClassVar[type[Optimisation]] = Optimisation
    facts: ClassVar[dict[str, Any]] = {
        "parameters": Natural | None,
        "versions": dict[str, Label] | None,
        "init": list[dict[str, Any]] | None,
        "converted_from": str | None,
    }

    model: str = AUTO
    """timm's name of the model."""
    attention: str = "softmax"
    """Attention of the model: softmax, g3b, g1u, "bspline(grid=10,order=3)-u", "g3b,rank=4,residual=softmax" ..."""
    data: str = ""
    """The data."""
    preset: Annotated[str, tyro.conf.arg(name="recipe")] = AUTO
    """The recipe's name. Its values are the defaults of the options below."""
    data_fraction: Share = 1.0
    """Share of the training and evaluation images to use, a fixed random subset."""
    data_dir: str | None = None
    """Where named data lies or is downloaded to; none: $KARAT_DATA or ~/.cache/karat."""
    init: str | None = None
    """Start from the weights of a RUN, a saved model, a safetensors FILE or hub:NAME."""
    seed: Seed = 0
    """Seed of initialisation, data order, augmentation and mixing."""
    output: Path | None = None
    """The run's folder; none: one below runs, named after data, model, attention and seed."""
    resume: str | None = None
    """A run's folder to go on with, or auto: go on with --output's run if there is one, else begin."""
    overwrite: bool = False
    """Begin again where the output folder already holds a run."""
    workers: Processes = 0
    """Processes that load data; 0 loads in the main process."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that can't be decoded ends the run, or is skipped and counted."""
    amp_dtype: Precision = "float32"
    """Precision of the forward pass; weights stay float32."""
    device: Device = "auto"
    """auto: the accelerator when there is one."""
    grad_accum_steps: Count = 1
    """Batches whose gradients are added up before an update."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    max_bad_steps: Natural = 20
    """Updates skipped for a non-finite loss or gradient before the run stops with a diagnosis."""
    checkpoint_hist: Count = 2
    """Full-state checkpoints kept besides the best."""
    recovery_interval: Natural = 0
    """Also write a checkpoint every so many updates; 0: at each epoch's end only."""
    checkpoints: Literal["last", "trajectory"] = "last"
    """trajectory: also keep the weights of every epoch, for loss landscapes."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the numbers of each epoch go besides metrics.jsonl."""
    patch_size: Count | None = None
    """Patch size of the model; none: the model's own."""
    embed_dim: Count | None = None
    """Embedding width of the model; none: the model's own."""
    depth: Count | None = None
    """Number of blocks of the model; none: the model's own."""
    num_heads: Count | None = None
    """Number of heads of the model; none: the model's own."""
    recipe: Annotated[Optimisation, tyro.conf.arg(name="")] = field(default_factory=Optimisation)

    def __post_init__(self) -> None:
        check(self)
        # A run says what it is, whatever is recommended when it's read again.
        object.__setattr__(self, "attention", KArAtConfig.explicit(self.attention))

    def check_facts(self, facts: dict[str, Any]) -> None:
        """Raise ValueError where what config.json says beside these settings can't be true of them."""

    @property
    def label(self) -> str:
        """What sets the run apart among others on the same data."""
        return self.attention

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the model that are set, by the names of its constructor's arguments."""
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        return {name: size for name in names if (size := getattr(self, name, None)) is not None}

    @property
    def starts_from(self) -> tuple[str | None, ...]:
        """Runs and files that the run takes weights from, as they are named."""
        return (self.init,)

    def folder_name(self) -> str:
        """The name of the run's folder below runs, where --output gives none."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        plain = asdict(self) | {"output": None if self.output is None else str(self.output)}
        return plain | {"track": list(self.track)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """Settings from what `as_dict` gave; ValueError names an entry that no setting has."""
        known = {f.name for f in fields(cls)}
        for name in plain:
            if name not in known:
                raise ValueError(f"config.json has {name!r}, which this version of karat does not know")
        values = dict(plain)
        recipe = convert("recipe", values["recipe"], dict)
        values["recipe"] = cls.recipe_type(**renamed(recipe, recipe.get("lr", cls.recipe_type.lr)))
        return cls(**{"track": ()} | values)


def slug(text: str) -> str:
    """Text as part of a folder's name."""
    kept = "".join(c if c.isalnum() or c in "._=" else "-" for c in text)
    return "-".join(part for part in kept.split("-") if part)


def data_slug(data: str) -> str:
    """A data set as part of a folder's name: of a path its last part."""
    return slug(Path(data).name if Path(data).exists() else data)


def told(settings: RunSettings) -> dict[str, Any]:
    """The settings that say how a model was trained, the recipe's among them, as plain values."""
    plain = settings.as_dict()
    values = {name: value for name, value in plain.items() if name not in NOT_TOLD} | {"recipe": settings.preset}
    return values | plain["recipe"]


def first_change(before: RunSettings, after: RunSettings) -> str | None:
    """The first setting that a continuation may not change and does, in words; None when there is none."""
    old, new = (plain | plain.pop("recipe") for plain in (before.as_dict(), after.as_dict()))
    for name, value in old.items():
        if name not in MAY_CHANGE and value != new[name]:
            return f"{name} was {value!r} and is now {new[name]!r}"
    return None
