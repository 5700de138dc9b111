"""A classifier that can be saved, shared and loaded by its folder or name alone."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from karat.models.backbones import backbone_of
from karat.models.create import PREFIX, REGISTERED
from karat.models.evaluating import computed_by, evaluating
from karat.models.regrid import check_patches
from karat.runs import saved
from karat.runs.checkpoint import first_difference
from karat.runs.saved import ModelConfig
from karat.share.hub import card, storage

# Arguments that say where weights come from: they're for building a model once, a saved one brings its own.
SOURCES = ("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
# Arguments about images that are `ModelConfig`'s.
OF_IMAGES = ("in_chans", "mean", "std", "crop_pct", "interpolation")
ALIKE = 1e-2  # of the logits' size: more isn't the rounding of half precision


class KArAtModel(
    nn.Module,
    ModelHubMixin,
    library_name="karat",
    pipeline_tag="image-classification",
    tags=["image-classification", "kolmogorov-arnold-attention"],
    paper_url="https://arxiv.org/abs/2503.10632",
):
    """A model by `karat.create_model` together with its `ModelConfig`: images (B,C,H,W) -> logits (B,classes).

    `backbone` is the model itself, for all that takes timm's models (`karat.resample_tokens(model.backbone, ...)`).
    `save_pretrained(folder)` writes config.json, model.safetensors and a model card; `push_to_hub(name)` uploads
    them; `KArAtModel.from_pretrained(folder or name)`, which is `karat.from_pretrained`, loads them.

    Args:
        config: what to build.
        backbone: the model, where it exists already; it must be the one that `config` describes.

    Raises:
        ValueError: a backbone whose weights or logits aren't those of the model that `config` describes.

    >>> model = KArAtModel.create("vit_tiny_patch16_224", "g3b", class_names=("cat", "dog"), img_size=32, depth=2)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 2])
    """

    def __init__(self, config: ModelConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        if backbone is None:
            self.backbone = saved.build(config)
        else:
            self.backbone = backbone
            check_rebuilds(backbone, self.present_config())

    @classmethod
    def create(
        cls,
        model: str,
        attention: str | None = None,
        mlp: str | None = None,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        img_size: int | tuple[int, int] | None = None,
        **arguments: Any,
    ) -> KArAtModel:
        """A new model: arguments as `karat.create_model`'s, and those of `ModelConfig` about images and classes.

        num_classes: None means one for each of class_names, or 1000 without names. img_size: None means the model's
        own. pretrained=True starts from timm's weights, which the saved model then brings along.
        """
        from karat.runs.model import input_size

        bare = model.split(".")[0]
        if attention is None:
            attention = REGISTERED.get(bare.removeprefix(PREFIX), "softmax") if bare.startswith(PREFIX) else "softmax"
        own = {name: arguments.pop(name) for name in OF_IMAGES if name in arguments}
        sources = {name: arguments.pop(name) for name in SOURCES if name in arguments}
        config = ModelConfig(
            model,
            attention,
            mlp or "mlp",
            num_classes=num_classes or len(class_names) or 1000,
            img_size=img_size or input_size(model),
            model_args=arguments | ({} if img_size is None else {"img_size": img_size}),
            class_names=tuple(class_names),
            **own,
        )
        made = cls(config, saved.build(config, **sources) if sources else None)
        check_patches(made.backbone)
        return made

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,classes) of images (B,C,H,W), normalised as `config` says."""
        logits: Tensor = self.backbone(images)
        return logits

    def predict(self, images: str | Path | Image.Image | Sequence[str | Path | Image.Image]) -> Tensor:
        """Probabilities (images, classes) of image files or PIL pictures, fitted and normalised as `config` says.

        One alone is a sequence of one.

        Raises ValueError for a file that can't be read as an image.
        """
        from karat.share.hub import predict

        some = [images] if isinstance(images, str | Path | Image.Image) else images
        return predict.probabilities(self, [predict.read(image, self.config) for image in some])

    def present_config(self) -> ModelConfig:
        """The configuration as the backbone now is: its image size and windows may have changed since it was built.

        A Swin's windows are written down whether they're the model's own or not.
        """
        sides = tuple(getattr(getattr(self.backbone, "patch_embed", None), "img_size", None) or self.config.sides)
        known = backbone_of(self.backbone)
        arguments = self.config.model_args | ({} if known is None else known.arguments(self.backbone))
        if sides == self.config.sides:
            if arguments == self.config.model_args:
                return self.config
            return dataclasses.replace(self.config, model_args=arguments)
        side = sides[0] if sides[0] == sides[1] else sides
        return dataclasses.replace(self.config, img_size=side, model_args=arguments | {"img_size": side})

    def save_pretrained(self, save_directory: str | Path, *, repo_id: str | None = None, **options: Any) -> str | None:
        """Write config.json, model.safetensors and, where there is none, a model card; options are huggingface_hub's.

        A model that was saved there before stays until all is written. Raises ValueError for a folder whose config.json
        is another's, a run's say.
        """
        folder = Path(save_directory)
        if (folder / saved.CONFIG).exists() and not saved.is_saved(folder):
            raise ValueError(
                f"{folder} has a {saved.CONFIG} that is no saved model's, a run's say: give another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".karat-", dir=folder) as draft:
            pushed = super().save_pretrained(draft, repo_id=repo_id or folder.name, **options)
            for name in (saved.WEIGHTS, saved.CONFIG, saved.CARD):
                if name != saved.CARD or not (folder / name).exists():
                    os.replace(Path(draft) / name, folder / name)
        return pushed

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config = self.present_config()
        weights = self.backbone.state_dict()
        saved.precision(weights, "the model")
        check_rebuilds(self.backbone, self.config)
        storage.write(save_directory, self.config, weights)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hub as "user/name"; options as huggingface_hub's `ModelHubMixin.push_to_hub`."""
        self.config = dataclasses.replace(self.config, training=self.config.training | {"repo": repo_id})
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card: README.md of the saved folder."""
        return card.model_card(
            self.config, sum(p.numel() for p in self.backbone.parameters()), self._hub_mixin_info.model_card_data
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # takes more
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> KArAtModel:
        """A saved model, in evaluation mode, from its folder or its name on the Hub ("user/name").

        Nothing but JSON and safetensors is read. The random state is left as it was.

        Args:
            map_location: the device to put it on. The others are huggingface_hub's.

        Raises:
            ValueError: no such folder or name, or a config or weights that are missing, damaged, of another version
                or don't fit; the message names the first difference.
        """
        folder = storage.fetch(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        config, weights = saved.read(folder)
        with torch.random.fork_rng(devices=()):
            try:
                model = cls(config)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{folder / saved.CONFIG} describes no model: {error}") from None
        saved.load(model.backbone, weights, str(folder / saved.WEIGHTS))
        return model.to(map_location).eval()


def check_rebuilds(backbone: nn.Module, config: ModelConfig) -> None:
    """Raise ValueError unless `config` gives a model with the weights of this one and, loaded with them, its logits."""
    like = next(backbone.parameters())
    comparable = not like.is_meta and len({p.dtype for p in backbone.parameters()}) == 1  # of several none is saved
    with torch.random.fork_rng(devices=()):
        again = saved.build(config).to(like)
        images = torch.rand(1, config.in_chans, *config.sides).to(like)
    difference = first_difference(again.state_dict(), backbone.state_dict())
    if difference is None and comparable:
        again.load_state_dict(backbone.state_dict())
        # another kernel rounds otherwise, and may not run here
        with torch.no_grad(), evaluating(backbone), evaluating(again), computed_by(backbone, "auto"):
            logits, wanted = (torch.cat([x.flatten() for x in tree_leaves(m(images))]) for m in (again, backbone))
        error = float((logits - wanted).norm() / wanted.norm().clamp(min=1e-6))
        if not error <= ALIKE and bool(wanted.isfinite().all()):
            difference = f"with the same weights its logits are {error:.1g} of their size away"
    if difference is not None:
        raise ValueError(f"the config does not describe this model, which could not be loaded again: {difference}")


def from_pretrained(name_or_folder: str | Path, **options: Any) -> KArAtModel:
    """A saved model from its folder or its name on the Hub; see `KArAtModel.from_pretrained`."""
    return KArAtModel.from_pretrained(name_or_folder, **options)
