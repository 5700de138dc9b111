"""The files of a saved model: written atomically, fetched, checked and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import logging
from torch import Tensor, nn

from karat.errors import first_line
from karat.operator.operator import with_factors
from karat.runs import files
from karat.share.hub.config import ModelConfig

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DIGEST = "weights_sha256"


def write(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors. The weights come first: a config that is there vouches for them."""
    files.write_tensors(folder / WEIGHTS, weights)
    files.write_json(folder / CONFIG, {**config.as_dict(), DIGEST: files.digest(folder / WEIGHTS)})


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a saved model; a run has a config.json of another kind."""
    try:
        plain = files.read_json(folder / CONFIG)
    except (ValueError, OSError):
        return False
    return isinstance(plain, dict) and "format" in plain


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What `write` wrote. Raises ValueError naming what is missing, damaged or not known."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no saved model: it has no {CONFIG}")
    plain = files.read_json(path)
    if isinstance(plain, dict) and "settings" in plain and "format" not in plain:
        raise ValueError(f"{folder} is a run: `karat hub {folder} --output DIR` makes a saved model of it")
    expected = plain.pop(DIGEST, None) if isinstance(plain, dict) else None
    config = ModelConfig.from_dict(plain, str(path))
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights} is not there")
    tensors = files.read_tensors(weights)
    found = files.digest(weights)
    if found != expected:
        noted = "no SHA-256" if expected is None else f"SHA-256 {str(expected)[:12]}…"
        raise ValueError(f"{weights} is refused: its SHA-256 is {found[:12]}…, {CONFIG} says {noted}")
    return config, tensors


def fetch(name_or_folder: str | Path, **options: Any) -> Path:
    """The folder itself, or that of the Hub's files in the local cache. Raises ValueError where there is none."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if folder.exists() or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"{name} is no folder; give a saved model's folder or its name on the Hub, user/name")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a name that can't be reached is one error here, not one warning an attempt
    try:
        downloaded = [Path(hf_hub_download(name, file, **options)) for file in (CONFIG, WEIGHTS)]
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{name} is no folder here and could not be had from the Hub: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    return downloaded[0].parent


def push(folder: Path, name: str, *, private: bool = False) -> None:
    """Upload a saved model's three files to the Hub. Raises ValueError for what the Hub refuses."""
    api = HfApi()
    try:
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=folder,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
            commit_message="A model by karat",
        )
    except (HfHubHTTPError, HFValidationError, OSError, LocalTokenNotFoundError) as error:
        raise ValueError(f"{folder} could not be uploaded to {name}: {first_line(error)}") from None


def first_difference(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What differs first between two sets of weights by name and shape, in words; None where nothing does."""
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name!r} is missing"
        if found[name].shape != tensor.shape:
            return f"{name!r} is {tuple(found[name].shape)}, the config gives {tuple(tensor.shape)}"
    extra = next((name for name in found if name not in wanted), None)
    return None if extra is None else f"{extra!r} has no place in the model that the config gives"


def load(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Give the model these weights, in their own precision; ValueError names the first difference."""
    weights = with_factors(model, weights)
    difference = first_difference(model.state_dict(), weights)
    if difference is not None:
        raise ValueError(f"{source} does not fit {CONFIG}: {difference}")
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if kinds and kinds != {torch.float32}:
        if len(kinds) > 1:
            listed = ", ".join(sorted(map(str, kinds)))
            raise ValueError(f"{source} mixes precisions ({listed}), a model is of one")
        model.to(kinds.pop())
    model.load_state_dict(weights)
