"""Everything that a detector's run is made of: what config.json holds and `karat detect train` offers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypedDict

import tyro

from karat.detect.recipes import RECIPES, DetectRecipe, get_recipe
from karat.runs.settings import AUTO, RunSettings, data_slug, slug
from karat.values import Count, Label, Natural


class Category(TypedDict):
    """A category as config.json has it."""

    id: int
    name: str


@dataclass(frozen=True)
class DetectSettings(RunSettings):
    """Train a Mask R-CNN on a plain ViT with COCO-format data. A run is one folder, as with karat train."""

    task: ClassVar[str] = "detect"
    command: ClassVar[str] = "karat detect train"
    recipe_type: ClassVar[type[DetectRecipe]] = DetectRecipe
    facts: ClassVar[dict[str, Any]] = RunSettings.facts | {
        "categories": list[Category],
        "train_images": Natural | None,
        "eval_images": Natural | None,
        "skipped": list[Label] | None,
    }

    model: str = "vit_tiny_patch16_224"
    """timm's name of a plain ViT: vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224, ..."""
    data: str = "coco"
    """A COCO JSON file, or a folder: of one, of train and val JSONs (annotations/instances_train*.json), or of train
    and valid folders; coco: the folder coco here or in --data-dir."""
    preset: Annotated[str, tyro.conf.arg(name="recipe")] = AUTO
    """Training recipe: published (224², Table 11), jitter (scale jitter and padding, 1024²), small (few images, two
    cores); auto: published. Its values are the defaults of the options below."""
    data_dir: str | None = None
    """Where the folder coco lies; none: $KARAT_DATA or ~/.cache/karat."""
    init: str | None = None
    """Start the trunk from the weights of a classification RUN, a saved model's folder, a safetensors FILE or hub:NAME,
    or all of the detector from a detection RUN; position embeddings and operators are resampled."""
    output: Path | None = None
    """The run's folder; none: runs/DATA-detect-MODEL-ATTENTION-sSEED."""
    images: str | None = None
    """The folder of the images, where it isn't beside the JSON."""
    eval_data: str | None = None
    """A COCO JSON to evaluate on; none: the data's own, or --eval-images of it."""
    eval_images: Count | None = None
    """Of one JSON without an evaluation part: hold out that many images, the last ones; none: a tenth."""
    eval_train: bool = False
    """Also measure AP on the training images after each epoch; for small data."""
    window: Count = 14
    """Side of an attention window in tokens."""
    global_blocks: tuple[Natural, ...] | None = None
    """The blocks that attend to the whole image; none: the last of each quarter (2, 5, 8, 11 of twelve)."""
    recipe: Annotated[DetectRecipe, tyro.conf.arg(name="")] = field(default_factory=lambda: RECIPES["published"])

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """As RunSettings.from_dict; rel_pos stood beside the recipe before it was the recipe's."""
        if "rel_pos" in plain and isinstance(plain.get("recipe"), dict):
            plain = {**plain, "recipe": {"rel_pos": plain["rel_pos"], **plain["recipe"]}}
            del plain["rel_pos"]
        return super().from_dict(plain)

    @classmethod
    def make(cls, **values: Any) -> DetectSettings:
        """Settings from values of either kind: `recipe` names a preset, its values may stand beside the others.

        >>> DetectSettings.make(attention="g3b", recipe="small", epochs=5).recipe.channels
        96
        """
        own = {f.name for f in fields(cls)}
        preset = values.pop("recipe", AUTO)
        base = cls(**{name: value for name, value in values.items() if name in own}, preset=preset).resolved()
        recipe = get_recipe(base.preset)
        return replace(base, recipe=recipe.override(**{k: v for k, v in values.items() if k not in own}))

    def resolved(self) -> DetectSettings:
        """These settings with every `auto` replaced by what it stands for."""
        preset = "published" if self.preset == AUTO else self.preset
        get_recipe(preset)  # an unknown name is refused here
        model = "vit_tiny_patch16_224" if self.model == AUTO else self.model
        return replace(self, preset=preset, model=model)

    def folder_name(self) -> str:
        """DATA-detect-MODEL-ATTENTION-sSEED."""
        data = data_slug(self.data).removesuffix(".json")
        return "-".join([data, "detect", slug(self.model), slug(self.attention), f"s{self.seed}"])

    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of the ViT's constructor that are set."""
        rates = {"proj_drop_rate": self.recipe.drop, "drop_path_rate": self.recipe.drop_path}
        return self.sizes | {name: rate for name, rate in rates.items() if rate}
