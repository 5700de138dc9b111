"""A saved model, what `karat hub` writes: a folder of config.json (a `ModelConfig`), model.safetensors, a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from karat.data.augmentation import INTERPOLATIONS
from karat.data.images import statistics
from karat.models.create import rebuild_model
from karat.models.kan.mlp import parse_mlp
from karat.operator.config import KArAtConfig
from karat.operator.operator import with_factors
from karat.runs import files
from karat.runs.checkpoint import check_fit
from karat.values import Count, Label, Natural, OneOf, Positive, Share, check

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DIGEST = "weights_sha256"
FORMAT = 1
OWN_MLP = "mlp"


class Training(TypedDict, total=False):
    """What a model card tells of where weights are from; further entries are kept."""

    name: Label
    repo: Label
    data: Label
    weights: Label
    epoch: Natural
    epochs: Natural
    results: dict[str, float]
    command: Label
    versions: dict[str, Label]
    settings: dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the weights that a saved model is made of.

    Args:
        model: a name for `karat.create_model`.
        attention: the attention's short name; which implementation runs it is no part of a model.
        mlp: "mlp" (the model's own), "kan", "grkan", ... as in `karat.create_model`.
        num_classes, in_chans: of the classifier and of its images.
        img_size: side of the images, or (height, width), in pixels.
        model_args: further arguments of the model's constructor, plain values: patch_size, embed_dim, ...
        class_names: one name a class, in the order of the logits; empty where there are none.
        mean, std: per channel, of pixels in [0, 1]: what images are normalised with; empty: ImageNet's for colour,
            0.5 for grey.
        crop_pct, interpolation: an image is resized to img_size / crop_pct, and its centre is cut out.
        training: plain facts about where the weights are from, for the model card.

    Raises:
        ValueError: a value that can't be, naming it.

    >>> ModelConfig("vit_tiny_patch16_224", "g3b", class_names=("cat", "dog"), num_classes=2).mean
    (0.485, 0.456, 0.406)
    """

    model: str
    attention: str = "softmax"
    mlp: str = OWN_MLP
    num_classes: Natural = 1000
    in_chans: Count = 3
    img_size: Count | tuple[Count, Count] = 224
    model_args: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[Label, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()
    crop_pct: Share = 1.0
    interpolation: Annotated[str, OneOf(INTERPOLATIONS)] = "bicubic"
    training: Annotated[dict[str, Any], Training] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.class_names, list | tuple):
            names: list[Any] = [*self.class_names]
            names = [str(name) if type(name) is int else name for name in names]
            object.__setattr__(self, "class_names", tuple(names))
        if isinstance(self.attention, KArAtConfig):
            object.__setattr__(self, "attention", str(self.attention))
        check(self)
        for name, default in zip(("mean", "std"), statistics(self.in_chans), strict=True):
            values = tuple(float(number) for number in getattr(self, name)) or default
            if len(values) != self.in_chans:
                raise ValueError(f"{name} has {len(values)} numbers for {self.in_chans} channels: {values}")
            object.__setattr__(self, name, values)
        # JSON has lists where constructors and comparisons want tuples
        object.__setattr__(self, "model_args", {name: _tuples(value) for name, value in self.model_args.items()})
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.num_classes} classes")
        if self.mlp != OWN_MLP:
            parse_mlp(self.mlp)
        # impl says how it was run here; another machine chooses for itself
        object.__setattr__(self, "attention", str(replace(KArAtConfig.parse(self.attention), impl="auto")))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `karat.create_model`."""
        common = {"attention": self.attention, "num_classes": self.num_classes, "in_chans": self.in_chans}
        return common | ({} if self.mlp == OWN_MLP else {"mlp": self.mlp}) | self.model_args

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, plain: Any, source: str = "the config") -> ModelConfig:
        """The configuration that `as_dict` wrote down.

        Raises ValueError naming the first entry that is missing, unknown or can't be; `source` says whose.
        """
        if not isinstance(plain, dict):
            raise ValueError(f"{source} is no table of settings but {type(plain).__name__}")
        if plain.get("format") != FORMAT:
            found = f"format {plain['format']!r}" if "format" in plain else "no format"
            raise ValueError(f"{source} has {found}: it is no saved model of this version of karat (format {FORMAT})")
        values = {name: value for name, value in plain.items() if name != "format"}
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{source} has {name!r}, which this version of karat does not know")
        for name in known:
            if name not in values:
                raise ValueError(f"{source} has no {name!r}")
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a saved model; a run has a config.json of another kind."""
    try:
        plain = files.read_json(folder / CONFIG)
    except (ValueError, OSError):
        return False
    return isinstance(plain, dict) and "format" in plain


def read_config(folder: Path) -> tuple[ModelConfig, str | None]:
    """A saved model's configuration, and the digest of its weights. Raises ValueError naming what isn't as it must."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no saved model: it has no {CONFIG}")
    plain = files.read_json(path)
    if isinstance(plain, dict) and "settings" in plain and "format" not in plain:
        raise ValueError(f"{folder} is a run: `karat hub {folder} --output DIR` makes a saved model of it")
    expected = plain.pop(DIGEST, None) if isinstance(plain, dict) else None
    return ModelConfig.from_dict(plain, str(path)), expected


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A saved model's configuration and weights. Raises ValueError naming what is missing, damaged or not known."""
    config, expected = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights} is not there")
    tensors = files.read_tensors(weights)
    found = files.digest(weights)
    if found != expected:
        noted = "no SHA-256" if expected is None else f"SHA-256 {str(expected)[:12]}…"
        raise ValueError(f"{weights} is refused: its SHA-256 is {found[:12]}…, {CONFIG} says {noted}")
    return config, tensors


def build(config: ModelConfig, **sources: Any) -> nn.Module:
    """The model that a configuration describes, its weights drawn anew."""
    return rebuild_model(config.model, **config.arguments(), **sources)


def load(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Give the model these weights, in their own precision; ValueError names the first difference."""
    weights = with_factors(model, weights)
    check_fit(model.state_dict(), weights, source)
    kind = precision(weights, source)
    if kind not in (None, torch.float32):
        model.to(kind)
    model.load_state_dict(weights)


def precision(weights: Mapping[str, Tensor], source: str) -> torch.dtype | None:
    """That of all weights, None where no number is real. Raises ValueError, beginning with `source`, for several."""
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(kinds) > 1:
        listed = ", ".join(sorted(map(str, kinds)))
        raise ValueError(f"{source} mixes precisions ({listed}), a model is of one: give it one by .float() or .to()")
    return next(iter(kinds), None)
